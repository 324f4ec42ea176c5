import json
from dataclasses import replace
from importlib.resources import files

import pytest
from tiny import VOCABULARIES, load_tokenizer

from tract_lite.scale import ScoreScale
from tract_lite.spec import DEFAULT_TEMPLATE, SPEC_FILE, JudgeSpec, Sampling, make_spec
from tract_lite.vocabulary import TransformersVocabulary


@pytest.fixture(scope="module")
def spec():
    return make_spec(
        load_tokenizer("spm"),
        ScoreScale.integers(1, 5),
        template="naïve {{ response }} 東京\n",
        sampling=Sampling(temperature=0.3),
        max_length=77,
        base_model="a/b",
        method={"stage": 2},
    )


def changed(spec: JudgeSpec, **fields) -> str:
    return json.dumps({**json.loads(spec.to_json()), **fields})


def test_json_gives_the_same_spec_back(spec):
    assert JudgeSpec.from_json(spec.to_json()) == spec


FIRST_FORMAT = """
{"format": 1, "template": "{{ response }}", "scale": {"labels": ["0", "1", "2"], "values": [0.0, 1.0, 2.0]},
 "chat": [1, "{prompt}"], "marker_ids": [421, 357, 648], "label_ids": [680, 667, 675],
 "pieces": ["\u2581score", "\u2581is", "\u2581", "0", "1", "2"], "eos_id": 2, "marker": "score is",
 "sampling": {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.03, "max_new_tokens": 77},
 "max_length": 3000, "base_model": "a/b", "method": {"stage": 2}}
"""


def test_a_spec_of_the_first_format_is_read_with_labels_of_one_token_each(tmp_path):
    (tmp_path / SPEC_FILE).write_text(FIRST_FORMAT, encoding="utf-8")
    spec = JudgeSpec.load(tmp_path)
    assert spec.label_ids == ((680,), (667,), (675,)) and spec.tokens.is_flat
    assert (spec.any_scale, spec.units, spec.scale) == (False, None, ScoreScale.integers(0, 2))
    assert (spec.marker_ids, spec.chat, spec.sampling.max_new_tokens) == ((421, 357, 648), (1, "{prompt}"), 77)
    assert JudgeSpec.from_json(spec.to_json()) == spec and json.loads(spec.to_json())["format"] == 2


@pytest.mark.parametrize("scale", ["0-100", "0-5:0.5", "poor=0,fair=0.5,good=1"])
def test_json_gives_back_labels_of_several_tokens_units_and_that_any_scale_will_do(scale):
    scale = ScoreScale.parse(scale)
    units = ScoreScale.parse("1-7")
    spec = make_spec(load_tokenizer("spm"), scale, any_scale=True, units=units)
    found = JudgeSpec.from_json(spec.to_json())
    assert found == spec and found.tokens == spec.tokens and (found.any_scale, found.units) == (True, units)


def test_a_saved_spec_is_found_by_its_file_and_by_its_folder(spec, tmp_path):
    spec.save(tmp_path)
    assert JudgeSpec.load(tmp_path) == JudgeSpec.load(tmp_path / SPEC_FILE) == spec


def test_a_folder_without_a_spec_is_refused_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=SPEC_FILE):
        JudgeSpec.load(tmp_path)


def test_the_default_template_is_a_file_of_the_package():
    template = files("tract_lite").joinpath("template.jinja").read_text(encoding="utf-8")
    assert make_spec(load_tokenizer("spm"), ScoreScale.integers(1, 5)).template == template == DEFAULT_TEMPLATE


def test_a_newer_format_is_refused_with_a_way_out(spec):
    with pytest.raises(ValueError, match="newer tract-lite"):
        JudgeSpec.from_json(changed(spec, format=99))


@pytest.mark.parametrize("text", ["", "no JSON", "null", "[]", "3", '"x"', "{}", '{"format": 1}', '{"format": "1"}'])
def test_garbage_is_refused_with_words(text):
    with pytest.raises(ValueError, match="not a readable judge spec"):
        JudgeSpec.from_json(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"surprise": 1},
        {"scale": None},
        {"scale": {"labels": ["1"], "values": [1]}},
        {"sampling": {"heat": 1}},
        {"chat": None},
        {"label_ids": 5},
    ],
)
def test_an_unknown_or_broken_field_is_refused_with_words(spec, fields):
    with pytest.raises(ValueError, match="not a readable judge spec"):
        JudgeSpec.from_json(changed(spec, **fields))


def test_every_vocabulary_accepts_its_own_spec_and_no_other():
    vocabularies = [TransformersVocabulary(load_tokenizer(name)) for name in VOCABULARIES]
    for vocabulary in vocabularies:
        spec = make_spec(vocabulary.tokenizer, ScoreScale.integers(1, 5))
        for other in vocabularies:
            if other is vocabulary:
                spec.check_vocabulary(other)
            else:
                with pytest.raises(ValueError, match="not the one the judge was trained with"):
                    spec.check_vocabulary(other)


def test_a_moved_label_is_refused(spec):
    moved = replace(spec, label_ids=(*spec.label_ids[1:], spec.label_ids[0]))
    with pytest.raises(ValueError, match="spell"):
        moved.check_vocabulary(TransformersVocabulary(load_tokenizer("spm")))
