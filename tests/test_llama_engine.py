import json
import math
import random
import shutil
from dataclasses import replace

import llama_cpp
import numpy as np
import pytest
import torch
from llama_cpp import llama_perf_context
from tiny import gguf_weights, make_family, make_llama, make_plain_judge, make_sentences
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from tract_lite import rail
from tract_lite.engines import llama as engine_module
from tract_lite.engines.llama import LlamaEngine, default_parallel
from tract_lite.engines.llama_cpp import cache_bytes, load_model, quiet_llama
from tract_lite.engines.task import Task
from tract_lite.export.converter import convert_model, quantize
from tract_lite.export.gguf import export_gguf
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec, Sampling, make_spec

pytestmark = pytest.mark.export

BOS = 1


@pytest.fixture(scope="module")
def folder(shared_once):
    return shared_once("plain_judge", make_plain_judge)


def spec_for(folder, marker: str, **sampling) -> JudgeSpec:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return make_spec(tokenizer, ScoreScale.integers(1, 5), marker=marker, max_length=256, sampling=Sampling(**sampling))


@pytest.fixture(scope="module")
def spec(folder):
    return JudgeSpec.load(folder / "model")


@pytest.fixture(scope="module")
def path(folder):
    return folder / "judge.gguf"


@pytest.fixture(scope="module")
def reference(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()


def open_engine(path, spec=None, parallel=16, **options) -> LlamaEngine:
    """An engine that computes in float32 throughout."""
    return LlamaEngine(path, spec, parallel=parallel, threads=1, flash_attention=False, cache_type="f32", **options)


def make_tasks(engine: LlamaEngine, count: int, n_cot: int = 1, words: int = 12) -> list[Task]:
    prompts = [" ".join(make_sentences(20, seed=n)).split()[: words + n % 5] for n in range(count)]
    return [
        Task([BOS, *engine.vocabulary.encode(" ".join(prompt))], [100 * n + k for k in range(n_cot)])
        for n, prompt in enumerate(prompts)
    ]


def reasonings(answer) -> list[list[int]]:
    return [sample.reasoning for sample in answer]


def scores(answer) -> np.ndarray:
    return np.array([sample.label_log_probabilities for sample in answer])


def label_tokens(spec: JudgeSpec) -> list[int]:
    """The one token of each label."""
    return [token for (token,) in spec.label_ids]


def reference_logits(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1]


def test_scores_are_those_of_transformers_for_the_same_reasonings(path, spec, reference):
    with open_engine(path) as engine:
        tasks = [
            replace(task, reasonings=[engine.vocabulary.encode(text)])
            for task, text in zip(make_tasks(engine, 8), make_sentences(8, seed=3))
        ]
        answers = dict(engine.run(tasks))
    for index, task in enumerate(tasks):
        ids = [*task.prompt, *task.reasonings[0], *spec.marker_ids]
        expected = reference_logits(reference, ids).log_softmax(-1)[label_tokens(spec)]
        [sample] = answers[index]
        assert sample.reasoning == task.reasonings[0] and not sample.truncated
        np.testing.assert_allclose(sample.label_log_probabilities, expected.numpy(), atol=1e-4)


def test_a_score_read_after_sampling_is_that_of_the_reasoning_given(path):
    with open_engine(path) as engine:
        tasks = make_tasks(engine, 30)
        sampled = dict(engine.run(tasks))
        given = dict(
            engine.run([replace(task, reasonings=reasonings(sampled[index])) for index, task in enumerate(tasks)])
        )
    assert any(not sample.truncated for answer in sampled.values() for sample in answer)
    for index in sampled:
        np.testing.assert_allclose(scores(sampled[index]), scores(given[index]), atol=1e-4)


def test_a_sample_is_the_same_alone_and_among_others(path):
    with open_engine(path) as together, open_engine(path, parallel=1) as alone:
        tasks = make_tasks(together, 16)
        answers = dict(together.run(tasks))
        for index in (0, 7, 15):
            [(_, answer)] = alone.run([tasks[index]])
            assert reasonings(answer) == reasonings(answers[index])
            np.testing.assert_allclose(scores(answer), scores(answers[index]), atol=1e-4)


@pytest.mark.parametrize("parallel", [4, 16])
def test_samples_of_one_item_equal_separate_ones(path, parallel):
    with open_engine(path, parallel=parallel) as engine, open_engine(path, parallel=1) as alone:
        [task] = make_tasks(engine, 1, n_cot=6, words=60)
        [(_, answer)] = engine.run([task])
        separate = [next(alone.run([Task(task.prompt, [seed])]))[1] for seed in task.seeds]
    assert reasonings(answer) == [reasonings(other)[0] for other in separate]
    np.testing.assert_allclose(scores(answer), np.concatenate([scores(a) for a in separate]), atol=1e-4)


@pytest.mark.parametrize("parallel", [4, 16])
def test_a_prompt_is_read_once_for_all_samples(path, spec, parallel):
    brief = replace(spec, sampling=Sampling(max_new_tokens=5))
    with open_engine(path, brief, parallel=parallel) as engine:
        [task] = make_tasks(engine, 1, n_cot=12, words=60)
        list(engine.run([task]))
        decoded = llama_perf_context(engine._context.pointer).n_p_eval
    assert len(task.prompt) < decoded < 2 * len(task.prompt)


def test_the_same_run_gives_the_same_answers_and_other_seeds_give_others(path):
    with open_engine(path) as engine:
        tasks = make_tasks(engine, 4, n_cot=2)
        others = [replace(task, seeds=[seed + 7 for seed in task.seeds]) for task in tasks]
        first, again, other = (dict(engine.run(given)) for given in (tasks, tasks, others))
    for index in first:
        assert reasonings(first[index]) == reasonings(again[index]) != reasonings(other[index])
        assert len({tuple(ids) for ids in reasonings(first[index])}) == 2


def test_only_a_reasoning_stopped_by_the_limit_is_truncated(path, spec):
    with open_engine(path) as engine:
        samples = [sample for _, answer in engine.run(make_tasks(engine, 40)) for sample in answer]
        texts = [engine.vocabulary.decode(sample.reasoning) for sample in samples]
    assert {sample.truncated for sample in samples} == {True, False}
    assert all(sample.truncated == (len(sample.reasoning) == 60) for sample in samples)
    assert not any(spec.marker in text for text in texts)


def test_a_reasoning_is_cut_where_the_context_ends(path, spec):
    with open_engine(path, context_length=64) as engine:
        tasks = make_tasks(engine, 16)
        answers = dict(engine.run(tasks))
    longest = max(
        len(task.prompt) + len(ids) + len(spec.marker_ids) + 2
        for index, task in enumerate(tasks)
        for ids in reasonings(answers[index])
    )
    assert longest == 64


def test_what_does_not_fit_is_answered_with_an_error_and_the_rest_goes_on(path):
    with open_engine(path, parallel=2, context_length=64) as engine:
        tasks = make_tasks(engine, 5)
        tasks[1] = Task([BOS] * 80, [0])
        tasks[3] = Task(tasks[3].prompt, [0], [[5] * 70])
        answers = dict(engine.run(tasks))
    assert str(answers[1]) == "prompt of 80 tokens does not fit in the context of 64 tokens"
    assert isinstance(answers[3], ValueError) and "prompt and reasoning" in str(answers[3])
    assert all(len(answers[index]) == 1 for index in (0, 2, 4))


@pytest.mark.parametrize("parallel", [1, 3, 16])
def test_every_task_comes_back_once_with_all_its_samples(path, parallel):
    with open_engine(path, parallel=parallel) as engine:
        answers = list(engine.run(iter(make_tasks(engine, 11, n_cot=5))))
    assert sorted(index for index, _ in answers) == list(range(11))
    assert all(len(answer) == 5 for _, answer in answers)


def test_tasks_are_taken_as_slots_come_free(path):
    taken = []
    with open_engine(path, parallel=2) as engine:
        run = engine.run(taken.append(task) or task for task in make_tasks(engine, 20))
        next(run)
        assert len(taken) < 6
        run.close()
        assert len(list(engine.run(taken))) == len(taken)


def test_greedy_sampling_penalises_generated_tokens_only(path, spec, reference):
    greedy = Sampling(temperature=0.0, repetition_penalty=1.5, max_new_tokens=25)
    with open_engine(path, replace(spec, sampling=greedy)) as engine:
        [task] = make_tasks(engine, 1)
        [(_, [sample])] = engine.run([task])
    penalty, generated = RepetitionPenaltyLogitsProcessor(1.5), []
    for _ in sample.reasoning:
        logits = reference_logits(reference, [*task.prompt, *generated])[None]
        if generated:
            logits = penalty(torch.tensor([generated]), logits)
        generated.append(int(logits.argmax()))
    assert len(sample.reasoning) > 5 and sample.reasoning == generated


def test_tokens_are_drawn_from_the_distribution_of_transformers(folder, path, reference):
    draws = 600
    spec = spec_for(folder, "So it is", temperature=0.6, top_p=0.7, max_new_tokens=1)
    with open_engine(path, spec) as engine:
        [task] = make_tasks(engine, 1)
        [(_, answer)] = engine.run([replace(task, seeds=range(draws))])
    rules = LogitsProcessorList([TemperatureLogitsWarper(0.6), TopPLogitsWarper(0.7)])
    logits = rules(None, reference_logits(reference, list(task.prompt))[None])
    expected = logits.softmax(-1)[0].numpy()
    drawn = [ids[0] if ids else spec.eos_id for ids in reasonings(answer)]
    counts = np.bincount(drawn, minlength=len(expected))
    assert counts[expected == 0].sum() == 0 and (expected > 0).sum() > 3
    # Five standard deviations: a false alarm about once in 100,000 seeds.
    deviation = np.sqrt(draws * expected * (1 - expected))
    assert (abs(counts - draws * expected) <= 5 * deviation + 1).all()


def test_an_engine_runs_once_at_a_time_and_not_after_it_is_closed(path):
    engine = open_engine(path, parallel=2)
    tasks = make_tasks(engine, 4)
    run = engine.run(tasks)
    next(run)
    with pytest.raises(RuntimeError, match="inside another run"):
        next(engine.run(tasks))
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(run)
    with pytest.raises(RuntimeError, match="closed"):
        next(engine.run(tasks))


def test_the_spec_comes_from_the_file_unless_one_is_given(path, spec):
    other = replace(spec, sampling=Sampling(max_new_tokens=3))
    with open_engine(path) as engine, open_engine(path, other) as with_other:
        assert engine.spec == spec and with_other.spec == other
        [(_, [sample])] = with_other.run(make_tasks(with_other, 1))
    assert len(sample.reasoning) <= 3


def test_a_file_with_a_spec_of_the_first_format_is_read(folder, spec, path, tmp_path, monkeypatch):
    """There, the labels were one id each."""
    data = json.loads(spec.to_json()) | {"format": 1, "label_ids": label_tokens(spec)}
    del data["any_scale"], data["units"]
    monkeypatch.setattr(JudgeSpec, "to_json", lambda self: json.dumps(data))
    convert_model(folder / "model", tmp_path / "judge.gguf", "f32", spec)
    monkeypatch.undo()
    with open_engine(tmp_path / "judge.gguf") as engine, open_engine(path) as today:
        assert engine.spec == today.spec == spec
        tasks = make_tasks(engine, 3)
        for (_, answer), (_, other) in zip(engine.run(tasks), today.run(tasks), strict=True):
            assert np.array_equal(scores(answer), scores(other))


def test_a_spec_of_another_vocabulary_is_refused(path, spec):
    with pytest.raises(ValueError, match="not the one the judge was trained with"):
        LlamaEngine(path, replace(spec, pieces=("x",) * len(spec.pieces)))


LENGTHS = (10, 100, 500, 1000, 2000)


def topic_prompt(rng: random.Random, length: int, topic: int) -> list[int]:
    """Random ids, half of them from the topic's own 15."""
    drawn = [
        rng.randrange(300 + 15 * topic, 315 + 15 * topic) if rng.random() < 0.5 else rng.randrange(3, 384)
        for _ in range(length - 1)
    ]
    return [BOS, *drawn]


@pytest.fixture(scope="module")
def trained(folder, shared_once):
    """A folder with a judge that has learnt to read the topic of prompts of 10 to 2,000 tokens.

    The label is the topic's in 6 of 10 cases, so that the distribution is neither flat nor sure.
    """
    return shared_once("topic_judge", lambda out: teach_topics(out, folder / "spm"))


def teach_topics(folder, spm) -> None:
    make_llama(folder, spm, 4.0, context=2304)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = make_spec(tokenizer, ScoreScale.integers(1, 5), max_length=2304)
    model, rng = AutoModelForCausalLM.from_pretrained(folder), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        length = int(math.exp(rng.uniform(math.log(10), math.log(2000))))
        rows, labels = [], []
        for _ in range(max(2, 2000 // length)):
            topic = rng.randrange(5)
            rows.append([*topic_prompt(rng, length, topic), *spec.marker_ids])
            labels.append(spec.label_ids[topic if rng.random() < 0.5 else rng.randrange(5)][0])
        logits = model(torch.tensor(rows), logits_to_keep=1).logits[:, -1]
        F.cross_entropy(logits, torch.tensor(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    spec.save(folder)
    export_gguf(folder, folder / "judge-f32.gguf", "f32", check=False)


@pytest.fixture(scope="module")
def trained_path(trained):
    return trained / "judge-f32.gguf"


@pytest.fixture(scope="module")
def long_tasks(trained):
    """Sixteen tasks with given reasonings, and the label logits and probabilities of float32."""
    spec, rng = JudgeSpec.load(trained), random.Random(1)
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    tasks, logits, probabilities = [], [], []
    for number in range(16):
        length = (*LENGTHS, 2000, 1000, 700, 300, 50)[number % 10]
        reasoning = [rng.randrange(3, 384) for _ in range(number)]
        tasks.append(Task(topic_prompt(rng, length, number % 5), [number], [reasoning]))
        row = reference_logits(model, [*tasks[-1].prompt, *reasoning, *spec.marker_ids])
        logits.append(row[label_tokens(spec)].numpy())
        probabilities.append(row.softmax(-1)[label_tokens(spec)].numpy())
    return tasks, np.array(logits), np.array(probabilities)


@pytest.fixture
def label_logits(monkeypatch):
    """The logits of the labels that an engine read its scores from, in that order."""
    read, original = [], rail.label_log_probabilities

    def spy(logits, label_ids):
        read.append(np.array(logits)[list(label_ids)])
        return original(logits, label_ids)

    monkeypatch.setattr(rail, "label_log_probabilities", spy)
    return read


def test_the_judge_of_the_exactness_tests_is_neither_flat_nor_sure(long_tasks):
    tasks, _, probabilities = long_tasks
    assert {len(task.prompt) for task in tasks} >= set(LENGTHS)
    assert (probabilities.sum(axis=1) >= 0.9).all()
    assert (probabilities.max(axis=1) < 0.9).all() and np.ptp(probabilities, axis=0).min() > 0.2


@pytest.mark.parametrize("parallel", [1, 16], ids=["alone", "beside 15 others"])
def test_in_float32_label_logits_and_probabilities_are_those_of_transformers(
    trained_path, long_tasks, label_logits, parallel
):
    tasks, logits, probabilities = long_tasks
    with open_engine(trained_path, parallel=parallel) as engine:
        answers = list(engine.run(tasks))
    for (index, [sample]), found in zip(answers, label_logits):
        np.testing.assert_allclose(found, logits[index], atol=1e-3)
        np.testing.assert_allclose(np.exp(sample.label_log_probabilities), probabilities[index], atol=1e-4)


def test_in_float16_with_the_defaults_probabilities_are_near_those_of_transformers(trained_path, long_tasks, tmp_path):
    tasks, _, probabilities = long_tasks
    quantize(trained_path, tmp_path / "judge-f16.gguf", "f16")
    with LlamaEngine(tmp_path / "judge-f16.gguf") as engine:
        answers = dict(engine.run(tasks))
    found = np.exp([answers[index][0].label_log_probabilities for index in range(len(tasks))])
    np.testing.assert_allclose(found, probabilities, atol=1e-2)


@pytest.fixture
def batches(monkeypatch):
    """How many tokens of each sequence every batch holds."""
    found, decode = [], engine_module.Context.decode

    def spy(self, tokens, positions, sequences, outputs):
        found.append({number: sequences.count(number) for number in set(sequences)})
        return decode(self, tokens, positions, sequences, outputs)

    monkeypatch.setattr(engine_module.Context, "decode", spy)
    return found


def total(batches: list[dict[int, int]]) -> int:
    return sum(sum(batch.values()) for batch in batches)


def test_all_prompts_are_read_before_their_reasonings_are_sampled_together(path, spec, batches):
    brief = replace(spec, sampling=Sampling(max_new_tokens=5))
    with open_engine(path, brief, parallel=8, context_length=500) as engine:
        tasks = make_tasks(engine, 8, words=100)
        assert len(list(engine.run(tasks))) == 8
    first = next(number for number, batch in enumerate(batches) if len(batch) == 8)
    assert first >= sum(len(task.prompt) for task in tasks) // 512 > 1
    assert all(count > 1 for batch in batches[:first] for count in batch.values())
    assert len(batches) - first <= 5 + len(spec.marker_ids) + 1


def interleaved_tasks(n_cot: int) -> list[Task]:
    """48 items under 4 rubrics in turn: 60 tokens of the rubric, 40 of their own."""
    rng = random.Random(0)
    rubrics = [[rng.randrange(3, 384) for _ in range(59)] for _ in range(4)]
    own = [[rng.randrange(3, 384) for _ in range(40)] for _ in range(48)]
    return [Task([BOS, *rubrics[n % 4], *own[n]], range(n_cot), [[5]] * n_cot) for n in range(48)]


@pytest.mark.parametrize("n_cot", [1, 8])
def test_interleaved_rubrics_are_read_few_times(path, spec, batches, n_cot):
    tasks = interleaved_tasks(n_cot)
    with open_engine(path, parallel=16) as engine:
        assert len(list(engine.run(tasks))) == 48
    scores = 48 * n_cot * (1 + len(spec.marker_ids))
    assert total(batches) - scores <= 48 * 40 + 10 * 60


def test_answers_come_at_most_two_windows_late(path):
    order = []
    with open_engine(path, parallel=4) as engine:
        for index, _ in engine.run(make_tasks(engine, 60)):
            order.append(index)
    delays = [place - index for place, index in enumerate(order)]
    assert max(delays) < 2 * 8 and sorted(order) == list(range(60))


def test_a_run_tells_its_shape(path):
    with open_engine(path, parallel=3, context_length=100, repack=False) as engine:
        shape = dict(engine.shape)
    assert shape.pop("system") == llama_cpp.llama_print_system_info().decode()
    assert shape == {
        "model": "judge.gguf",
        "parallel": 3,
        "context_length": 100,
        "threads": 1,
        "batch_size": 512,
        "gpu_layers": -1,
        "flash_attention": False,
        "cache_type": "f32",
        "repack": False,
        "llama_cpp_python": llama_cpp.__version__,
    }


def test_where_it_is_left_open_parallel_follows_from_the_size_of_the_cache(path):
    of_8_billion, of_1_billion = 4 * 32 * 8 * 128, 4 * 16 * 8 * 64
    lengths = (256, 1152, 3000, 100_000)
    assert [default_parallel(length, of_8_billion) for length in lengths] == [64, 26, 10, 1]
    assert [default_parallel(length, of_1_billion) for length in lengths] == [64, 64, 40, 1]
    # What a sequence takes at any length counts as well.
    assert [default_parallel(length, of_8_billion, 10**8) for length in lengths] == [29, 15, 8, 1]
    model = load_model(path)
    assert cache_bytes(model) == 4 * 2 * 2 * 16  # layers, heads of keys and values, their size
    quiet_llama().llama_model_free(model)
    with LlamaEngine(path, threads=1, context_length=100) as engine:
        assert engine.shape["parallel"] == 64
        assert len(list(engine.run(make_tasks(engine, 40, n_cot=2)))) == 40


def test_heads_may_be_wider_than_the_model(folder, tmp_path):
    make_family(tmp_path / "wide", folder / "spm", "qwen3", head_dim=32)
    model = load_model(export_gguf(tmp_path / "wide", tmp_path / "wide.gguf", "f32", check=False))
    assert cache_bytes(model) == 4 * 2 * 2 * 32
    quiet_llama().llama_model_free(model)


def test_an_item_that_the_model_can_not_compute_does_not_stop_the_others(path, tmp_path):
    broken = shutil.copy(path, tmp_path / "broken.gguf")
    gguf_weights(broken)["token_embd.weight"][300] = math.nan
    with open_engine(broken, parallel=1) as engine:
        healthy = [BOS, *range(310, 330)]
        answers = dict(engine.run([Task(healthy, [0]), Task([*healthy, 300], [0])]))
    assert np.isfinite(scores(answers[0])).all() and np.isnan(scores(answers[1])).all()
    assert reasonings(answers[1]) == [[]]
