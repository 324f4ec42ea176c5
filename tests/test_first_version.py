"""A judge of the first version and what that said of two items: it is read, and judges as before.

`first_version/judge.gguf` is a random Llama (32 wide, one layer, float32) with a spec of format 1.
"""

import json
from pathlib import Path

import pytest

from tract_lite.judge import Judge
from tract_lite.record import Record, Rubric
from tract_lite.spec import JudgeSpec

FOLDER = Path(__file__).parent / "first_version"
RECORDS = [
    Record("Explain it.", "It is clear.", Rubric("Is it clear?", {"1": "No.", "5": "Yes."})),
    Record(prompt="The answer is short and wrong."),
]
EXACT = {"cache_type": "f32", "parallel": 1, "threads": 1, "flash_attention": False}


def test_its_spec_is_read():
    spec = JudgeSpec.load(FOLDER)
    ids = json.loads((FOLDER / "judge_spec.json").read_text())["label_ids"]
    assert spec.label_ids == tuple((one,) for one in ids) and spec.tokens.is_flat
    assert (spec.any_scale, spec.units) == (False, None)
    assert JudgeSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("spec", [None, FOLDER, FOLDER / "judge_spec.json"])
def test_it_judges_as_before(spec):
    before = json.loads((FOLDER / "judged.json").read_text())
    with Judge.from_gguf(FOLDER / "judge.gguf", spec, **EXACT) as judge:
        direct = [one.probabilities for one in judge.score_many(RECORDS, n_cot=0)]
        given = list(judge.score_many(RECORDS, reasonings=[row["feedback_ids"] for row in before]))
    for row, own, judged in zip(before, direct, given, strict=True):
        assert own == pytest.approx(row["direct"], rel=1e-4)
        assert judged.probabilities == pytest.approx(row["probabilities"], rel=1e-4)
        assert judged.score == pytest.approx(row["score"], rel=1e-4)
