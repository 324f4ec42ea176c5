"""Labels of several tokens: their probabilities are those of each label scored alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import pytest
import torch
from hybrids import VOCABULARY as HYBRID_VOCABULARY, make_hybrid
from hypothesis import given, settings, strategies as st
from judges import NESTED, SCALES, make_reader
from servers import FakeLlamaServer, FakeVLLM, fake_server
from tiny import BYTE_LEVEL, REAL, VOCABULARIES, export_judge, make_sentences, told
from transformers import AutoModelForCausalLM, AutoTokenizer

from tract_lite.engines.context import Context
from tract_lite.engines.llama import LlamaEngine
from tract_lite.engines.server import ServerEngine
from tract_lite.engines.task import Task
from tract_lite.engines.transformers import TransformersEngine
from tract_lite.export.converter import convert_model
from tract_lite.judge import Judge
from tract_lite.judgement import Judgement
from tract_lite.prompt import prompt_ids
from tract_lite.rail import (
    PRUNED_MASS,
    LabelReading,
    expected_score,
    label_log_probabilities,
    read_top_log_probabilities,
)
from tract_lite.record import Record
from tract_lite.scale import ScoreScale, ScoreTokens, find_score_tokens
from tract_lite.spec import JudgeSpec, Sampling, make_spec
from tract_lite.vocabulary import TransformersVocabulary

END = 9
EXACT: dict[str, Any] = {"threads": 1, "flash_attention": False, "cache_type": "f32"}


@pytest.fixture(scope="module")
def reader(shared_once: Callable[..., Path]) -> Callable[[str], Path]:
    """The folder of such a judge with one of `VOCABULARIES`."""
    return lambda name: shared_once(f"reader {name}", lambda folder: make_reader(folder, name))


@pytest.fixture(scope="module")
def exported(reader: Any, shared_once: Callable[..., Path]) -> Callable[[str], Path]:
    """Its GGUF file in float32."""

    def make(name: str) -> Path:
        folder = reader(name) / "model"
        return shared_once(f"reader gguf {name}", lambda out: export_judge(name, folder, out / "judge.gguf"))

    return lambda name: make(name) / "judge.gguf"


@torch.inference_mode()
def alone(model: Any, before: Sequence[int], tokens: ScoreTokens) -> np.ndarray:
    """The probability (K,) of each label, in a sequence of its own, without a cache."""
    found = {}
    for size in sorted(set(map(len, tokens.labels))):
        # Of one length, so that there is no padding.
        labels = [label for label in tokens.labels if len(label) == size]
        for some in (labels[start : start + 32] for start in range(0, len(labels), 32)):
            logits = model(torch.tensor([[*before, *label] for label in some]), logits_to_keep=size + 1).logits.double()
            for label, rows in zip(some, logits - logits.logsumexp(-1, keepdim=True)):
                path = sum(rows[n, token].item() for n, token in enumerate(label))
                longer = {other[size] for other in tokens.labels if len(other) > size and other[:size] == label}
                found[label] = math.exp(path) * (1 - sum(math.exp(rows[-1, token].item()) for token in longer))
    return np.array([found[label] for label in tokens.labels])


def make_records(scales: Sequence[ScoreScale | None] = tuple(SCALES.values()), seed: int = 1) -> list[Record]:
    """A record on each scale."""
    texts = make_sentences(len(scales), seed=seed)
    return [Record(response=text, scale=scale, id=str(n)) for n, (text, scale) in enumerate(zip(texts, scales))]


def check(
    judgements: Sequence[Judgement], records: Sequence[Record], folder: Path, spec: JudgeSpec, within: float = 1e-5
):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    vocabulary = TransformersVocabulary(AutoTokenizer.from_pretrained(folder))
    for record, judgement in zip(records, judgements, strict=True):
        assert not judgement.error
        scale = record.scale or spec.scale
        tokens = find_score_tokens(vocabulary, spec.marker, scale)
        [reasoning] = judgement.feedback_ids or [[]]
        expected = alone(model, [*prompt_ids(record, spec, vocabulary), *reasoning, *tokens.marker], tokens)
        found = np.array([judgement.probabilities[label] for label in scale.labels])
        np.testing.assert_allclose(found, expected, atol=within)
        np.testing.assert_allclose(found[found > 0], expected[found > 0], rtol=100 * within)
        size = np.abs(scale.values)
        assert abs(judgement.score - expected @ scale.values) <= judgement.error_bound + within * size.sum()
        assert judgement.error_bound <= PRUNED_MASS * size.max()
        # Else there would be nothing to tell.
        assert 5e-4 < expected.sum() <= 1 and expected.max() < 0.9, (str(scale), expected)


def scales_for(name: str) -> list[ScoreScale]:
    """All, but for large vocabularies, where each takes seconds."""
    return [scale for text, scale in SCALES.items() if name not in REAL or text != "1-100"]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_mixture_of_scales_is_read_as_each_label_alone_in_transformers(reader, name):
    folder = reader(name) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    spec, records = JudgeSpec.load(folder), make_records(scales_for(name))
    judge = Judge.from_model(model, AutoTokenizer.from_pretrained(folder), spec, parallel=4)
    for n_cot in (1,) if name in REAL else (0, 1):
        check(list(judge.score_many(records, n_cot)), records, folder, spec)


@pytest.mark.export
@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_mixture_of_scales_is_read_as_each_label_alone_in_llama_cpp(reader, exported, name):
    folder, records = reader(name) / "model", make_records(scales_for(name))
    with Judge.from_gguf(exported(name), parallel=4, **EXACT) as judge:
        for n_cot in (1,) if name in REAL else (0, 1):
            check(list(judge.score_many(records, n_cot)), records, folder, judge.spec)


@pytest.mark.long
@pytest.mark.parametrize("name", REAL)
def test_a_hundred_labels_are_read_as_each_alone_in_a_real_vocabulary(reader, exported, name):
    folder, records = reader(name) / "model", make_records([SCALES["1-100"]])
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    spec = JudgeSpec.load(folder)
    check(list(Judge.from_model(model, tokenizer, spec, parallel=1).score_many(records)), records, folder, spec)
    with Judge.from_gguf(exported(name), parallel=2, **EXACT) as judge:
        check(list(judge.score_many(records)), records, folder, judge.spec)


@pytest.mark.parametrize("text", SCALES)
def test_a_judge_of_one_scale_reads_it_as_each_label_alone(reader, text):
    folder = reader("split digits") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = make_spec(tokenizer, SCALES[text], template="{{ response }}\n", sampling=Sampling(max_new_tokens=8))
    model, records = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), make_records([None] * 3)
    judge = Judge.from_model(model, tokenizer, spec, parallel=2)
    check(list(judge.score_many(records)), records, folder, spec)
    refused = next(judge.score_many([replace(records[0], scale=ScoreScale.parse("0-7"))]))
    assert refused.error and "asks for the scale 0-7, and this judge answers on" in refused.error


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """The positions and the sequences of each batch that llama.cpp decodes."""
    found: list[tuple[list[int], list[int]]] = []
    decode = Context.decode

    def spy(self: Context, tokens: Any, positions: Any, sequences: Any, outputs: Any) -> None:
        found.append((list(positions), list(sequences)))
        decode(self, tokens, positions, sequences, outputs)

    monkeypatch.setattr(Context, "decode", spy)
    return found


def tree_tasks(engine: Any, count: int, scale: ScoreScale, n_cot: int = 1) -> list[Task]:
    vocabulary, spec = engine.vocabulary, engine.spec
    tokens = find_score_tokens(vocabulary, spec.marker, scale)
    records = make_records([scale] * count, seed=2)
    return [
        Task(prompt_ids(record, spec, vocabulary), range(10 * n, 10 * n + n_cot), None, tokens)
        for n, record in enumerate(records)
    ]


def assert_same(answers: dict[int, Any], others: dict[int, Any], within: float = 1e-5) -> None:
    assert answers.keys() == others.keys()
    for index, answer in answers.items():
        for sample, other in zip(answer, others[index], strict=True):
            assert (sample.reasoning, sample.truncated) == (other.reasoning, other.truncated)
            found, expected = np.exp(sample.label_log_probabilities), np.exp(other.label_log_probabilities)
            np.testing.assert_allclose(found, expected, atol=within)
            assert sample.end_mass == pytest.approx(other.end_mass, abs=1e-4)


@pytest.mark.export
@pytest.mark.parametrize("n_cot", [1, 3])
def test_sixteen_trees_at_once_are_as_one_alone_and_a_branch_costs_one_token(exported, batches, n_cot):
    path = exported("split digits")
    with LlamaEngine(path, parallel=16, **EXACT) as engine:
        tasks = tree_tasks(engine, 24, SCALES["0-100"], n_cot)
        together = dict(engine.run(tasks))
    tokens = tasks[0].tokens
    assert len(tokens.following) == 11 and any(set(sequences) == set(range(16)) for _, sequences in batches)
    batches.clear()
    with LlamaEngine(path, parallel=1, **EXACT) as engine:
        assert_same(together, dict(engine.run(tasks)))
    if n_cot == 1:
        decoded = sum(len(positions) for positions, _ in batches)
        written = sum(len(sample.reasoning) for answer in together.values() for sample in answer)
        most = sum(len(task.prompt) + len(tokens.marker) + len(tokens.following) for task in tasks) + written
        assert decoded <= most


@pytest.mark.export
def test_a_model_with_a_state_reads_its_trees_as_each_label_alone(shared_once, batches):
    folder = shared_once("hybrid that knows digits", make_digit_hybrid)
    spec = replace(JudgeSpec.load(folder / "model"), any_scale=True, sampling=Sampling(max_new_tokens=8))
    records = [Record(prompt=text, scale=SCALES["0-100"]) for text in make_sentences(6, seed=4)]
    with Judge.from_gguf(folder / "judge.gguf", spec, parallel=3, **EXACT) as judge:
        judgements = list(judge.score_many(records))
        prompts = [len(prompt_ids(record, spec, judge.engine.vocabulary)) for record in records]
    check(judgements, records, folder / "model", spec, within=1e-4)
    tokens = find_score_tokens(
        TransformersVocabulary(AutoTokenizer.from_pretrained(folder / "model")), spec.marker, SCALES["0-100"]
    )
    written = sum(len(judgement.feedback_ids[0]) + 1 for judgement in judgements)
    # For a branch nothing is read again but its own tokens.
    most = sum(prompts) + written + len(records) * (len(tokens.marker) + 2 * len(tokens.following))
    assert written > 12 and sum(len(positions) for positions, _ in batches) <= most
    decoded = Counter(position for positions, _ in batches for position in positions)
    assert decoded[0] == len(records) and all(decoded[n] <= len(records) for n in range(min(prompts) - 1))


def make_digit_hybrid(folder: Path) -> None:
    make_hybrid(folder, "qwen3.5")
    spec, model = JudgeSpec.load(folder / "model"), AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    labels = find_score_tokens(TransformersVocabulary(tokenizer), spec.marker, SCALES["0-100"]).labels
    with torch.no_grad():
        model.get_output_embeddings().weight[sorted({token for path in labels for token in path})] *= 3
    model.save_pretrained(folder / "model")
    with told(BYTE_LEVEL[HYBRID_VOCABULARY][0]):
        convert_model(folder / "model", folder / "judge.gguf", "f32", spec)


@pytest.mark.export
@pytest.mark.parametrize("kind", ["llama-server", "vLLM"])
@pytest.mark.parametrize("text", ["1-5", "0-10", "0-100", NESTED])
def test_servers_tell_of_trees_what_the_engine_in_process_does(reader, exported, kind, text):
    folder, path = reader("split digits") / "model", exported("split digits")
    fake = FakeLlamaServer(path, folder) if kind == "llama-server" else FakeVLLM(folder, str(folder))
    with (
        LlamaEngine(path, parallel=4, **EXACT) as local,
        fake_server(fake) as url,
        ServerEngine(url, spec=path) as engine,
    ):
        tasks = [replace(task, reasonings=[[5, 6]]) for task in tree_tasks(local, 5, SCALES[text])]
        answers, exact = dict(engine.run(tasks)), dict(local.run(tasks))
    values = SCALES[text].values
    for index, [sample] in answers.items():
        found, expected = (np.exp(one.label_log_probabilities) for one in (sample, exact[index][0]))
        assert abs(expected_score(found, values) - expected_score(expected, values)) <= sample.error_bound + 1e-3
        assert sample.error_bound < 0.2 * SCALES[text].width
        # A label that begins others may hold what the top ones leave out, and no other may.
        seen = [
            n for n, path in enumerate(tasks[0].tokens.labels) if path not in tasks[0].tokens.following and found[n] > 0
        ]
        np.testing.assert_allclose(found[seen], expected[seen], atol=1e-5)
        assert sample.end_mass == pytest.approx(exact[index][0].end_mass, abs=sample.missing_mass + 1e-3)


@given(st.lists(st.floats(-50, 50, width=32), min_size=10, max_size=10), st.permutations(range(10)), st.integers(2, 9))
def test_labels_of_one_token_are_read_bit_for_bit_as_before(logits, order, count):
    labels = tuple((token,) for token in order[:count])
    reading = LabelReading(ScoreTokens((0,), labels, tuple(range(count))), END)
    reading.add_logits((), np.array(logits, dtype=np.float32))
    expected = label_log_probabilities(np.array(logits, dtype=np.float32), order[:count])
    assert np.array_equal(reading.log_probabilities, expected) and not reading.wanted
    assert (reading.error_bound, reading.missing_mass, reading.end_mass) == (0, 0, 1)


@st.composite
def trees(draw: st.DrawFn) -> tuple[ScoreTokens, dict[tuple[int, ...], np.ndarray]]:
    """A random tree of labels, and the logits of ten tokens after each of its nodes."""
    paths = st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple)
    labels = tuple(draw(st.lists(paths, min_size=2, max_size=14, unique=True)))
    values = tuple(draw(st.lists(st.floats(-9, 9), min_size=len(labels), max_size=len(labels), unique=True)))
    tokens = ScoreTokens((0,), labels, values)
    peak = draw(st.sampled_from([1.0, 4.0, 8.0]))
    drawn = np.random.default_rng(draw(st.integers(0, 999)))
    return tokens, {node: peak * drawn.normal(size=10) for node in tokens.following}


def exact(tokens: ScoreTokens, logits: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """The probabilities (K,) of the labels, each by itself."""
    after = {node: np.exp(row - row.max()) / np.exp(row - row.max()).sum() for node, row in logits.items()}
    found = []
    for label in tokens.labels:
        path = math.prod(after[label[:n]][token] for n, token in enumerate(label))
        longer = {
            other[len(label)] for other in tokens.labels if len(other) > len(label) and other[: len(label)] == label
        }
        found.append(path * (1 - sum(after[label][token] for token in longer)))
    return np.array(found)


def read(tokens: ScoreTokens, logits: dict[tuple[int, ...], np.ndarray]) -> tuple[LabelReading, list[tuple[int, ...]]]:
    """A tree read to its end, and the nodes that were read."""
    reading, nodes = LabelReading(tokens, END), []
    while reading.wanted:
        nodes.append(reading.wanted[-1])
        reading.add_logits(nodes[-1], logits[nodes[-1]])
    return reading, nodes


@settings(max_examples=300, deadline=None)
@given(trees())
def test_what_is_not_followed_has_next_to_no_probability_and_the_bound_covers_it(tree):
    tokens, logits = tree
    reading, nodes = read(tokens, logits)
    found, expected = np.exp(reading.log_probabilities), exact(tokens, logits)
    assert len(set(nodes)) == len(nodes) and set(nodes) <= set(tokens.following)
    left_out = np.array(
        [any(path[:n] in logits and path[:n] not in nodes for n in range(1, len(path) + 1)) for path in tokens.labels]
    )
    assert (found[left_out] == 0).all() and expected[left_out].sum() <= 5e-6
    np.testing.assert_allclose(found[~left_out], expected[~left_out], rtol=1e-9, atol=1e-13)
    difference = abs(expected_score(found, tokens.values) - expected_score(expected, tokens.values))
    assert difference <= reading.error_bound + 1e-12 <= 5e-6 * max(map(abs, tokens.values)) + 1e-11
    assert 0 <= reading.end_mass <= 1 + 1e-9 and found.sum() <= 1 + 1e-9


@settings(max_examples=300, deadline=None)
@given(trees(), st.integers(1, 10))
def test_where_a_tree_is_read_from_top_log_probabilities_the_exact_score_lies_within_the_bound(tree, count):
    tokens, logits = tree
    reading = LabelReading(tokens, END)
    while reading.wanted:
        node = reading.wanted[-1]
        row = label_log_probabilities(logits[node], range(10))
        top = [(int(token), float(row[token])) for token in np.argsort(-row)[:count]]
        reading.add(node, read_top_log_probabilities(top, reading.asked(node)))
    difference = (
        expected_score(np.exp(reading.log_probabilities), tokens.values) - exact(tokens, logits) @ tokens.values
    )
    assert abs(difference) <= reading.error_bound + 1e-9
    assert count < 10 or reading.error_bound <= 5e-6 * max(map(abs, tokens.values)) + 1e-11


def test_what_is_unseen_after_a_label_counts_by_its_distance_from_the_label():
    tokens = ScoreTokens((0,), ((1,), (1, 0)), (-5.0, 5.0))
    reading = LabelReading(tokens, END)
    reading.add((), read_top_log_probabilities([(1, 0.0)], reading.asked(())))
    reading.add((1,), read_top_log_probabilities([(END, math.log(0.7))], reading.asked((1,))))
    assert reading.error_bound == pytest.approx(0.3 * 10)


def test_of_a_sure_model_s_tree_little_is_read():
    tokens = ScoreTokens((0,), tuple((ten, one) for ten in range(9) for one in range(9)), tuple(range(81)))
    sure = {node: np.where(np.arange(10) == 4, 16.0, 0.0) for node in tokens.following}
    reading, nodes = read(tokens, sure)
    assert nodes == [(), (4,)] and 0 < reading.error_bound < 5e-6 * 80
    unsure = {node: np.zeros(10) for node in tokens.following}
    assert len(read(tokens, unsure)[1]) == 10


NESTED_TREE = ScoreTokens((0,), ((1,), (1, 0), (7,), (1, 0, 0)), (1.0, 10.0, 7.0, 100.0))


def logits_of(**probabilities: float) -> np.ndarray:
    """Logits of ten tokens, by `t` and their number; the others share what is left."""
    given_ = {int(name[1:]): probability for name, probability in probabilities.items()}
    rest = (1 - sum(given_.values())) / (10 - len(given_))
    return np.log([max(given_.get(token, rest), 1e-300) for token in range(10)])


def test_a_label_that_begins_others_has_what_does_not_lead_on_and_end_mass_tells_where_that_lies():
    logits = {(): logits_of(t1=0.6, t7=0.3), (1,): logits_of(t0=0.25, t9=0.5), (1, 0): logits_of(t0=0.2, t9=0.8)}
    reading, nodes = read(NESTED_TREE, logits)
    assert nodes == [(), (1,), (1, 0)]
    np.testing.assert_allclose(np.exp(reading.log_probabilities), [0.6 * 0.75, 0.15 * 0.8, 0.3, 0.15 * 0.2])
    assert reading.end_mass == pytest.approx((0.6 * 0.5 + 0.15 * 0.8) / (0.6 * 0.75 + 0.15 * 0.8))


@pytest.mark.parametrize("ends, expected", [(0.75, 1.0), (0.0, 0.0), (0.3, 0.4)])
def test_end_mass_is_one_where_a_judge_ends_its_labels_and_zero_where_it_does_not(ends, expected):
    tokens = ScoreTokens((0,), ((1,), (1, 0), (7,)), (1.0, 10.0, 7.0))
    reading, _ = read(tokens, {(): logits_of(t1=0.9, t7=0.1), (1,): logits_of(t0=0.25, t9=ends)})
    assert reading.end_mass == pytest.approx(expected, abs=1e-9)


def test_where_no_label_begins_another_or_none_may_end_end_mass_is_one():
    tokens = ScoreTokens((0,), ((1, 0), (1, 1), (7,)), (1.0, 10.0, 7.0))
    reading, nodes = read(tokens, {(): logits_of(t1=0.5), (1,): logits_of(t0=0.5)})
    assert reading.end_mass == 1 and len(nodes) == 2
    sure, _ = read(NESTED_TREE, {(): logits_of(t7=1.0), (1,): logits_of(), (1, 0): logits_of()})
    assert sure.end_mass == 1


def test_a_judgement_tells_the_end_mass_of_its_reasonings(reader):
    folder = reader("split digits") / "model"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    spec = JudgeSpec.load(folder)
    [record] = make_records([SCALES["0-10"]])
    judge = Judge.from_model(model, tokenizer, spec)
    judgement = judge.score(record, n_cot=3)
    engine = TransformersEngine(model, tokenizer, spec)
    tokens = find_score_tokens(engine.vocabulary, spec.marker, SCALES["0-10"])
    task = Task(prompt_ids(record, spec, engine.vocabulary), [0] * 3, judgement.feedback_ids, tokens)
    [(_, samples)] = engine.run([task])
    assert judgement.end_mass == pytest.approx(np.mean([sample.end_mass for sample in samples]))
    assert 0 < judgement.end_mass < 1 and Judgement.from_row(judgement.to_row()).end_mass == judgement.end_mass
    assert judge.score(replace(record, scale=None), n_cot=3).end_mass == 1


def test_what_is_unseen_after_a_label_may_be_no_label_at_all():
    # 1 leads on to 1 4 0 alone; the 4 is not seen, and what follows it may be anything.
    tokens = ScoreTokens((0,), ((1,), (1, 4, 0)), (0.75, 0.5))
    reading = LabelReading(tokens, END)
    reading.add((), read_top_log_probabilities([(1, 0.0)], reading.asked(())))
    reading.add((1,), read_top_log_probabilities([(END, math.log(0.9))], reading.asked((1,))))
    assert reading.error_bound == pytest.approx(0.1 * 0.75)
