import json
import logging

import pytest
from llama_cpp import llama_model_free
from tiny import SHARED, VOCABULARIES, load_tokenizer, make_llama, make_sentences, make_spm
from transformers import AutoTokenizer

from tract_lite.engines.llama_cpp import load_model
from tract_lite.export import parity
from tract_lite.export.parity import Parity, check_export, check_ids, compare, hard_records
from tract_lite.judge import Judge
from tract_lite.prompt import prompt_ids
from tract_lite.record import Record
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec, make_spec
from tract_lite.vocabulary import GGUFVocabulary, TransformersVocabulary


def changed(spec: JudgeSpec, **fields) -> JudgeSpec:
    return JudgeSpec.from_json(json.dumps(json.loads(spec.to_json()) | fields))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    return make_llama(folder / "model", make_spm(folder / "spm", make_sentences()))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def spec(tokenizer):
    return make_spec(tokenizer, ScoreScale.integers(1, 5), max_length=512)


def judge_from(folder, spec) -> Judge:
    spec.save(folder)
    return Judge.from_pretrained(folder, batch_size=2)


def test_a_judge_is_like_itself_and_unlike_another(folder, spec, tmp_path):
    records = [Record(prompt=text, id=text) for text in ("It is clear.", "Why so?", "a b" * 400)]
    judge, other = (
        judge_from(place, spec) for place in (folder, make_llama(tmp_path / "other", folder.parent / "spm", seed=1))
    )
    judged = list(judge.score_many(records))
    assert [bool(judgement.error) for judgement in judged] == [False, False, True]
    same, unlike = compare(judge, judge, records, judged), compare(judge, other, records, judged)
    assert same == Parity(2, 0, 0.0, 0.0, 0.0)
    assert 0 < unlike.mean_difference <= unlike.largest_difference
    assert 0 < unlike.mean_distance < 1
    with pytest.raises(ValueError, match="judged by both"):
        compare(judge, other, records[2:], judged[2:])


@pytest.mark.parametrize("name", sorted(set(VOCABULARIES) - {"trained"}))
def test_hard_records_are_read_alike_with_real_vocabularies(name):
    tokenizer = load_tokenizer(name)
    model = load_model(SHARED / "tokenizers" / name / "vocab.gguf", vocab_only=True)
    spec = make_spec(tokenizer, ScoreScale.integers(1, 5))
    check_ids(spec, tokenizer, GGUFVocabulary(model), hard_records(spec))
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
    """Splits what the tokenizer joins."""

    def encode(self, text: str) -> list[int]:
        return [token for character in text for token in super(Misreading, self).encode(character)]


def test_a_prompt_with_other_tokens_is_found_with_its_place(spec, tokenizer):
    record = Record(prompt="The answer", id="item 7")
    with pytest.raises(RuntimeError, match="record item 7 has other tokens from position 3 on"):
        check_ids(spec, tokenizer, Misreading(tokenizer), [record])


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


def test_scores_are_not_compared_where_memory_is_too_small_and_the_log_says_so(spec, tokenizer, folder, caplog):
    caplog.set_level(logging.INFO)
    assert check_export(spec, tokenizer, folder, {}, 10**15, records=[]) == {}
    assert "takes 4000001.0 GB of memory" in caplog.text
