"""The gate of an export: same ids, same scores, and what it says where they differ."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from judges import make_wide_judge
from llama_cpp import llama_model_free
from tiny import (
    BYTE_LEVEL,
    ODD_TEXTS,
    REAL,
    SHARED,
    TRAINED,
    export_judge,
    gguf_weights,
    load_tokenizer,
    make_family,
    make_gemma_spm,
    make_llama,
    make_phi_spm,
    make_sentences,
    make_spm,
    vocabulary_folder,
)
from transformers import AutoConfig, AutoTokenizer

from tract_lite.data.records import read_records
from tract_lite.engines.llama_cpp import load_model
from tract_lite.engines.task import Task, room_for
from tract_lite.export import parity
from tract_lite.export.gguf import export_gguf
from tract_lite.export.parity import Parity, check_export, check_ids, compare, hard_records, long_record, reading_limit
from tract_lite.judge import Judge
from tract_lite.prompt import prompt_ids
from tract_lite.record import Annotation, Record
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec, make_spec
from tract_lite.training.seed_model import load_seed
from tract_lite.vocabulary import GGUFVocabulary, TransformersVocabulary


def changed(spec: JudgeSpec, **fields) -> JudgeSpec:
    return JudgeSpec.from_json(json.dumps(json.loads(spec.to_json()) | fields))


@pytest.fixture(scope="module")
def wide(shared_once) -> Path:
    return shared_once("wide_judge", make_wide_judge)


@pytest.fixture(scope="module")
def folder(wide) -> Path:
    return wide / "model"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def spec(tokenizer):
    return make_spec(tokenizer, ScoreScale.integers(1, 5), max_length=512)


def judge_from(folder, spec) -> Judge:
    return Judge.from_pretrained(folder, spec, parallel=2)


def test_a_judge_is_like_itself_and_unlike_another(folder, spec, tmp_path):
    records = [Record(prompt=text, id=text) for text in ("It is clear.", "Why so?", "a b" * 400)]
    judge, other = (
        judge_from(place, spec) for place in (folder, make_llama(tmp_path / "other", vocabulary_folder("spm"), seed=1))
    )
    judged = list(judge.score_many(records))
    assert [bool(judgement.error) for judgement in judged] == [False, False, True]
    same, unlike = compare(judge, judge, records, judged), compare(judge, other, records, judged)
    assert same == Parity(2, 0, 0.0, 0.0, 0.0)
    assert 0 < unlike.mean_difference <= unlike.largest_difference
    assert 0 < unlike.mean_distance < 1
    with pytest.raises(ValueError, match="judged by both"):
        compare(judge, other, records[2:], judged[2:])


def texts_for(name: str) -> list[str]:
    """Odd texts and sentences; for a real vocabulary also real prompts and reasonings."""
    texts = ODD_TEXTS + make_sentences(87, seed=1)
    if name in REAL:
        real = read_records(SHARED / "data" / "vicuna_eval.json")
        texts += [record.prompt for record in real] + [record.annotations[0].feedback for record in real]
    return texts


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *REAL])
def test_byte_level_and_real_vocabularies_are_read_alike_on_both_sides(name):
    tokenizer = load_tokenizer(name)
    model = load_model(vocabulary_folder(name) / "vocab.gguf", vocab_only=True)
    ours, theirs = GGUFVocabulary(model), TransformersVocabulary(tokenizer)
    differing = [text for text in texts_for(name) if ours.encode(text) != theirs.encode(text)]
    assert differing == [] and len(ours) == len(theirs)
    spec = make_spec(tokenizer, ScoreScale.integers(1, 5))
    check_ids(spec, tokenizer, ours, hard_records(spec))
    llama_model_free(model)


def test_an_exported_spm_vocabulary_is_read_alike_on_both_sides(wide, tokenizer):
    model = load_model(wide / "out" / "judge-3.2-f32", vocab_only=True)
    ours, theirs = GGUFVocabulary(model), TransformersVocabulary(tokenizer)
    differing = [text for text in texts_for("spm") if ours.encode(text) != theirs.encode(text)]
    assert differing == [] and len(ours) == len(theirs)
    llama_model_free(model)


def test_special_tokens_in_hard_records_are_text(spec, tokenizer):
    specials = ["<s>", "</s>"]
    vocabulary = TransformersVocabulary(tokenizer)
    for record in hard_records(spec, specials):
        ids = prompt_ids(record, spec, vocabulary)
        assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in ids
    assert any(all(text in record.response for text in specials) for record in hard_records(spec))


@pytest.mark.parametrize("start", [[], [1, 1], [2]])
def test_a_missing_doubled_or_wrong_start_token_is_found(spec, tokenizer, start):
    assert spec.chat == (1, "{prompt}")
    faulty = changed(spec, chat=[*start, "{prompt}"])
    with pytest.raises(RuntimeError, match="own chat format has \\['<s>'\\]"):
        check_ids(faulty, tokenizer, TransformersVocabulary(tokenizer), [])


def test_ids_that_spell_something_else_are_found(spec, tokenizer, tmp_path):
    other = AutoTokenizer.from_pretrained(make_spm(tmp_path, make_sentences(seed=8), size=400))
    with pytest.raises(RuntimeError, match="in transformers and .* in llama.cpp"):
        check_ids(spec, tokenizer, TransformersVocabulary(other), [])


class Misreading(TransformersVocabulary):
    """Reads another last token, or adds one."""

    def __init__(self, tokenizer, adds: bool):
        super().__init__(tokenizer)
        self.adds = adds

    def encode(self, text: str) -> list[int]:
        ids = super().encode(text)
        return [*ids, 5] if self.adds else [*ids[:-1], ids[-1] + 1]


@pytest.mark.parametrize("adds, place", [(False, 2), (True, 3)])
def test_a_prompt_with_other_tokens_is_found_with_its_place(spec, tokenizer, adds, place):
    record = Record(prompt="The answer", id="item 7")
    with pytest.raises(RuntimeError, match=f"record item 7 has other tokens from position {place} on"):
        check_ids(spec, tokenizer, Misreading(tokenizer, adds), [record])


def test_scores_beyond_the_bound_of_the_type_are_a_warning(spec, caplog):
    fine, wrong = Parity(5, 0, 0.009, 0.5, 0.009), Parity(5, 0, 0.011, 0.5, 0.009)
    parity._report("f16", fine, spec)
    parity._report("q4_k_m", Parity(5, 0, 0.9, 1.5, 0.9), spec)
    wide = ScoreScale.integers(1, 9)
    parity._report("f16", wrong, changed(spec, scale={"labels": wide.labels, "values": wide.values}))
    assert not caplog.records
    parity._report("f16", wrong, spec)
    assert "scores differ by 0.0110" in caplog.text and "more than the 0.0100" in caplog.text
    caplog.clear()
    parity._report("f16", Parity(5, 0, 0.001, 0.1, 0.2), spec)
    assert "distributions differ by 0.2000" in caplog.text and "scores" not in caplog.text


def test_a_long_record_beyond_its_own_bound_is_a_warning_that_says_what_to_do(spec, caplog):
    # Short ones that differ as much as a type does raise its bound.
    parity._report("q4_k_m", Parity(5, 0, 0.1, 0.5, 0.1, 500, 0.9, 0.39), spec, 64)
    parity._report("f16", Parity(5, 0, 0.0, 0.0, 0.0, 500, 0.9, 0.09), spec, 64)
    assert not caplog.records
    parity._report("q4_k_m", Parity(5, 0, 0.1, 0.5, 0.1, 500, 0.9, 0.41), spec, 64)
    assert "differ by 0.4100 at 500 tokens, those of others by 0.1000" in caplog.text
    assert "of 64 tokens at most with this file (context_length=64), or take another seed model" in caplog.text
    caplog.clear()
    parity._report("f16", Parity(5, 0, 0.0, 0.0, 0.0, 500, 0.9, float("nan")), spec)
    assert "judge texts as short as those with this file" in caplog.text


@pytest.mark.parametrize("length", [60, 200, 512])
@pytest.mark.parametrize("name", TRAINED)
def test_a_long_record_fills_the_length_and_fits(name, length):
    spec = make_spec(load_tokenizer(name), ScoreScale.integers(1, 5), max_length=length)
    vocabulary = TransformersVocabulary(load_tokenizer(name))
    reasoning = vocabulary.encode("It is clear.")
    prompt = prompt_ids(long_record(spec, vocabulary, reasoning, length), spec, vocabulary)
    assert room_for(Task(prompt, [0], [reasoning]), spec, length) >= len(reasoning)
    assert length - 50 < len(prompt) + len(reasoning) + len(spec.marker_ids) + 2 <= length


def test_where_memory_is_too_small_for_a_long_record_the_others_are_compared(wide, tokenizer, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    free = parity.GB + 2**20
    monkeypatch.setattr(parity.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(parity.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    file, spec = wide / "out" / "judge-3.2-f32", JudgeSpec.load(wide / "model")
    figures = check_export(spec, tokenizer, wide / "model", {"f32": file}, weights=0)["f32"]
    assert figures.records == 5 and figures.long_tokens == 0
    assert "no record of 512 tokens is compared" in caplog.text


WINDOW = {"sliding_window": 200}
LONG_ROPE = {
    "sliding_window": None,
    "original_max_position_embeddings": 128,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 128,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    },
}


@pytest.mark.export
@pytest.mark.parametrize(
    "family, options, limit",
    [
        ("phi3", WINDOW, 200),
        ("mistral", WINDOW, 200),
        ("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 0}, 200),
        ("phi3", LONG_ROPE, 128),
        ("mistral", {"sliding_window": None}, None),
        ("gemma2", {**WINDOW, "query_pre_attn_scalar": 16, "tie_word_embeddings": True, "std": 0.05}, None),
    ],
    ids=["phi3", "mistral", "qwen2", "long rope", "mistral whole", "gemma2"],
)
def test_the_gate_sees_that_llama_cpp_reads_long_records_otherwise(tmp_path, caplog, family, options, limit):
    vocabulary = {"gemma2": make_gemma_spm, "qwen2": lambda _: vocabulary_folder("split digits")}.get(
        family, make_phi_spm
    )
    folder = make_family(tmp_path / "model", vocabulary(tmp_path / "vocabulary"), family, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    make_spec(tokenizer, ScoreScale.integers(1, 5), template="{{ response }}\n", max_length=400).save(folder)
    name = "split digits" if family == "qwen2" else "spm"
    export_judge(name, folder, tmp_path / "judge.gguf")
    assert reading_limit(AutoConfig.from_pretrained(folder)) == limit
    warnings = [record.getMessage() for record in caplog.records if record.name == parity.__name__]
    if limit:
        assert f"judge texts of {limit} tokens at most with this file (context_length={limit})" in warnings[0]
    else:
        assert not warnings


@pytest.mark.export
def test_a_file_whose_texts_are_kept_short_is_the_judge_that_was_trained(tmp_path):
    """What the warning advises: within the window, or in a context that takes the short factors."""
    spm = make_phi_spm(tmp_path / "spm")
    for name, options, limit in (("window", WINDOW, 200), ("rope", LONG_ROPE, 128)):
        folder = make_family(tmp_path / name, spm, "phi3", **options)
        spec = make_spec(AutoTokenizer.from_pretrained(folder), ScoreScale.integers(1, 5), max_length=400)
        spec.save(folder)
        file = export_gguf(folder, tmp_path / f"{name}.gguf", "f32", check=False)
        records = [Record(prompt="The answer is short. " * count) for count in (1, 10)]
        model, tokenizer = load_seed(folder, False, backend="transformers", precision="float32")
        reasonings = [[TransformersVocabulary(tokenizer).encode("It is clear.")]] * 2
        with Judge.from_model(model, tokenizer, spec) as reference:
            judged = list(reference.score_many(records, reasonings=reasonings))
            with Judge.from_gguf(file, context_length=limit, threads=1) as judge:
                assert compare(reference, judge, records, judged).mean_distance < 0.01


def test_scores_are_not_compared_where_memory_is_too_small_and_the_log_says_so(spec, tokenizer, folder, caplog):
    caplog.set_level(logging.INFO)
    assert check_export(spec, tokenizer, folder, {}, 10**15, records=[]) == {}
    assert "takes 4000001.0 GB of memory" in caplog.text


def test_the_gate_passes_what_is_the_same_and_prints_its_figures_where_no_log_takes_them(wide, tokenizer, capsys):
    file, spec = wide / "out" / "judge-3.2-f32", JudgeSpec.load(wide / "model")
    figures = check_export(spec, tokenizer, wide / "model", {"f32": file}, weights=0)["f32"]
    assert figures.records == 5 and figures.different_prompts == 0 and figures.mean_distance <= 0.001
    assert 480 < figures.long_tokens < 512 and figures.long_distance <= 0.01
    shown = capsys.readouterr().err
    assert "the ids of 5 prompts" in shown and "parity: f32: 5 records" in shown and "distributions by 0.00" in shown


def test_a_file_of_another_head_is_found_by_its_distributions(wide, tokenizer, tmp_path):
    """The score of a random model hardly moves: its labels hold next to no probability."""
    file = shutil.copy(wide / "out" / "judge-3.2-f32", tmp_path / "judge.gguf")
    weights = gguf_weights(file)["output.weight"]
    weights[:] = weights[:, ::-1].copy()
    weights.flush()
    figures = check_export(JudgeSpec.load(wide / "model"), tokenizer, wide / "model", {"f32": file}, weights=0)
    assert figures["f32"].mean_distance > 0.05


def test_the_gate_reads_the_records_own_reasonings_and_a_fixed_one_for_the_others(wide, tokenizer, monkeypatch):
    records = [
        Record(prompt="The answer", feedback="It is clear. So the overall score is 4"),
        Record(prompt="Why so?"),
        Record(prompt="The step", annotations=(Annotation("It is kind.", 3.0), Annotation("No.", 1.0))),
        Record(prompt="The source", feedback=" "),
        Record(prompt="The source", feedback="It is long. " * 200),
    ]
    read = []

    def note(judge: Judge, other: Judge, records: list[Record], judgements: list) -> Parity:
        read.extend(judgement.feedback for judgement in judgements)
        return compare(judge, other, records, judgements)

    monkeypatch.setattr(parity, "compare", note)
    monkeypatch.setattr(parity, "_judged_long", lambda *_: [])
    file, spec = wide / "out" / "judge-3.2-f32", JudgeSpec.load(wide / "model")
    figures = check_export(spec, tokenizer, wide / "model", {"f32": file}, 0, records)["f32"]
    fixed = "The answer is short and clear, but it gives no reason."
    assert read[:4] == [["It is clear."], [fixed], ["It is kind."], [fixed]]
    assert figures.records == 4 and figures.largest_difference <= 0.001


def test_a_direct_judge_is_compared_as_it_judges_without_reasonings(wide, tokenizer, monkeypatch):
    read = []

    def note(judge: Judge, other: Judge, records: list[Record], judgements: list) -> Parity:
        read.extend(judgements)
        return compare(judge, other, records, judgements)

    monkeypatch.setattr(parity, "compare", note)
    file, spec = wide / "out" / "judge-3.2-f32", JudgeSpec.load(wide / "model")
    direct = replace(spec, method={"raft_weight": 1.0, "direct_share": 1.0})
    figures = check_export(direct, tokenizer, wide / "model", {"f32": file}, weights=0)["f32"]
    assert figures.records == 5 and figures.mean_distance <= 0.001
    assert 480 < figures.long_tokens < 512 and figures.long_distance <= 0.01
    with Judge.from_gguf(file, spec, parallel=1) as judge:
        expected = [one.score for one in judge.score_many(hard_records(spec, [])[:1], 0)]
    assert len(read) == 6 and not any(judgement.feedback for judgement in read)
    assert expected[0] == pytest.approx(read[0].score, abs=0.001)


def test_no_records_are_as_none_given(wide, tokenizer):
    file, spec = wide / "out" / "judge-3.2-q8_0", JudgeSpec.load(wide / "model")
    assert check_export(spec, tokenizer, wide / "model", {"q8_0": file}, 0, [])["q8_0"].records == 5
