"""Scales in data, on the command line, in training and in reports: proposed, named, of an item."""

from __future__ import annotations

import csv
import datetime
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stages import SHORT, make_records, small_seed_model
from tiny import SHARED, export_judge, load_tokenizer, make_llama, vocabulary_folder

from tract_lite import (
    Judgement,
    Record,
    Rubric,
    Run,
    ScoreScale,
    compare_judges,
    evaluate,
    make_spec,
    parse_options,
    preset_for,
    read_records,
    read_splits,
    records_from,
    settings_of,
    train_adapter,
    write_records,
)
from tract_lite.__main__ import main
from tract_lite.data.formats import record_to_row
from tract_lite.data.jsonl import read_json, read_rows, write_rows
from tract_lite.data.records import BadRows
from tract_lite.data.scales import brings_others, propose_scale
from tract_lite.data.table import read_judged, scales_in, write_table
from tract_lite.prompt import render
from tract_lite.report.items import judged_in_run, numbers_of
from tract_lite.report.page import write_report
from tract_lite.spec import JudgeSpec
from tract_lite.training.settings import TrainSettings

GRADES = ScoreScale.parse("bad=0,ok=0.5,good=1")
TEN = ScoreScale.integers(1, 10)


# What the data propose.


@pytest.mark.parametrize(
    "golds, described, proposed",
    [
        ([0.0, 4.4, 5.0], "", "0-5"),
        ([1, 4], "", "1-5"),
        ([1, 9], "", "1-10"),
        ([0, 55, 100], "", "0-100:10"),
        ([0, 1], "", "0-1"),
        ([0.2, 1], "", "0-1:0.1"),
        ([-1, 0.5], "", "-1-1"),
        ([150, 420], "", "100-500:100"),
        ([1, 3], "1 2 3", "1-3"),
        ([0.0, 4.4], "0 1 2 3 4 5", "0-5"),
        ([1, 3.5], "1 5", "1-5"),
        ([1, 7], "1 7", "1-7"),
        ([1, 5], "1 3 5", "1-5:2"),
        ([2], "1 3 5", "1-5"),
        ([0, 70], "0 50 100", "0-100:10"),
        ([0, 2.5], "0 0.5 1 2.5", "0-2.5:0.5"),
        ([1, 9], "1 2 3", "1-10"),
        ([3, 9], "Met 1", "1-10"),
    ],
)
def test_described_labels_go_before_usual_scales_that_hold_all_gold_scores(golds, described, proposed):
    assert str(ScoreScale.proposed(golds, described.split())) == proposed


def test_labels_are_proposed_without_gold_scores_and_nothing_is_not():
    assert ScoreScale.proposed([], ["1", "2", "3"]) == ScoreScale.integers(1, 3)
    with pytest.raises(ValueError, match="no gold scores to propose a scale from: --scale names one"):
        ScoreScale.proposed([], ["Met", "Not met"])


def test_a_proposal_says_why_and_how_to_name_another(caplog):
    rubric = Rubric("c", {"0": "no", "2": "yes", "1": "half"})
    scale = propose_scale([Record(rubric=rubric, score=0.5), Record(rubric=rubric, score=2.0)])
    assert scale == ScoreScale.integers(0, 2)
    [said] = caplog.messages
    assert said.startswith(
        "scale: 0-2 (gold scores from 0.5 to 2; 1 of 2 between two labels; rubrics describe 0, 1, 2)"
    )
    assert said.endswith("; --scale names another")


def described(labels: str, score: float) -> Record:
    return Record(rubric=Rubric("c", {label: f"level {label}" for label in labels.split()}), score=score)


def test_a_few_scores_off_the_described_labels_make_no_other_scale():
    records = [described("1 2 3 4 5", 1 + n % 5) for n in range(29)]
    assert propose_scale(records) == ScoreScale.integers(1, 5)
    with pytest.raises(ValueError) as refused:
        propose_scale([*records, described("1 3 5", 45)])
    assert str(refused.value).splitlines() == [
        "1 of 30 gold scores, such as 45, are off 1-5, which the rubrics describe",
        "--scale 1-5 --skip-bad leaves them out, --scale may name another",
    ]
    assert propose_scale([described("1 2 3", score) for score in (1, 2, 9)]) == ScoreScale.integers(1, 10)


def test_rubrics_of_several_scales_are_not_thrown_together():
    with pytest.raises(ValueError, match="the rubrics describe several scales: 1-5, 1-10\n.*a column `scale`"):
        propose_scale([described("1 2 3 4 5", 5), described("1 4 7 10", 5)])
    assert propose_scale([described("1 2 3 4 5", 5), described("1 5", 3)]) == ScoreScale.integers(1, 5)


def test_every_annotators_score_counts_for_a_proposal():
    assert propose_scale([Record(score=4.0, gold_scores=(3.0, 5.0)), Record(score=1.0)]) == ScoreScale.integers(1, 5)
    assert propose_scale([Record(score=4.0, gold_scores=(0.0, 8.0))]) == ScoreScale.integers(0, 10)


def test_items_with_a_scale_of_their_own_propose_it_where_the_others_say_nothing():
    assert propose_scale([Record(scale=TEN), Record(scale=GRADES), Record(scale=TEN)]) == TEN
    assert propose_scale([Record(scale=TEN, score=9.0), Record(score=0.0)]) == ScoreScale.integers(0, 1)
    assert propose_scale([Record(response="r")]) == ScoreScale.integers(1, 5)


def test_a_run_reads_its_scale_from_the_data_and_finds_it_again(tmp_path):
    rows = [{"response": f"text {n}", "score": n % 11 * 10} for n in range(60)]
    write_rows(tmp_path / "data.jsonl", rows)
    options = parse_options(["--preset", "quick", "--data", str(tmp_path / "data.jsonl")])
    preset = preset_for(options)
    assert preset.scale is None and settings_of(options)["scale"] == "auto"
    run = Run(tmp_path / "run")
    for read in (read_splits, pytest.fail):
        run.folder.mkdir(exist_ok=True)
        data = run.data(read, **preset.splits)
        assert data.scale == ScoreScale.parse("0-100:10")
        assert preset.on(data.records, data.scale).seed["scale"] == data.scale


def test_a_scale_that_was_named_goes_before_a_proposal():
    preset = preset_for(parse_options(["--preset", "24gb", "--scale", "0-5:0.5"]))
    named = ScoreScale.steps(0, 5, "0.5")
    assert preset.scale == named and preset.on([Record(score=9.0)], TEN).scale == named


def test_the_built_in_example_keeps_its_scale():
    for name in ("demo", "quick"):
        assert settings_of(parse_options(["--preset", name]))["scale"] == "1-5"


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data come on top where they are")
def test_similarities_with_fractions_need_no_option():
    data = str(SHARED / "data" / "sts_train.jsonl")
    splits = read_splits(**preset_for(parse_options(["--preset", "24gb", "--data", data])).splits)
    assert splits.scale == ScoreScale.integers(0, 5)
    assert any(record.score % 1 for record in splits.training if record.score is not None)


# What a row names.


@pytest.mark.parametrize("name", ["scale", "Scale", "score_scale"])
def test_a_column_names_the_scale_of_each_item(tmp_path, name):
    path = tmp_path / "data.csv"
    path.write_text(f'response,score,{name}\na,7,1-10\nb,ok,"bad=0,ok=0.5,good=1"\nc,3,\n')
    ten, grade, plain = read_records(path, scale=ScoreScale.integers(1, 5))
    assert (ten.scale, ten.score) == (TEN, 7.0) and (grade.scale, grade.score) == (GRADES, 0.5)
    assert plain.scale is None and plain.score == 3.0


@pytest.mark.parametrize("inside", [{"scale": "1-10"}, {"Scale": {"1": 1, "10": 10}}])
def test_a_rubric_object_names_its_own_scale(inside):
    [record] = records_from([{"response": "a", "rubric": {"criteria": "c", **inside}, "score": 10}])
    assert record.scale is not None and record.scale.contains(10) and record.rubric == Rubric("c")
    text = '{"rubric": {"criteria": "c", "scale": "1-10"}}'
    assert records_from([{"response": "a", "rubric": text}])[0].scale == TEN


def test_ready_prompts_and_items_of_several_annotators_have_scales_too():
    rows = [{"prompt": "Judge: a", "scale": "1-10", "score": 9}]
    assert records_from(rows, scale=GRADES)[0].scale == TEN
    rows = [{"instruction": "p", "gpt4_feedback": ["a", "b"], "gpt4_score": [7, 9], "scale": "1-10"}]
    [item] = records_from(rows, scale=ScoreScale.integers(1, 5))
    assert item.scale == TEN and [pair.scale for pair in item.pairs()] == [TEN, TEN]


@pytest.mark.parametrize(
    "cell, words",
    [
        ("1-", "line 3: the scale '1-' can't be read: give its lowest and highest score"),
        ("0-5:0.3", "line 3: the scale '0-5:0.3' can't be read: no steps of 0.3 lead from 0 up to 5"),
        ("0-5000", "line 3: the scale '0-5000' can't be read: .*1,001 at most; take a wider step"),
        ("bad=0", "line 3: the scale 'bad=0' can't be read: .*two labels or more"),
        (7, "line 3: scale must be a text such as 1-5, got 7"),
        ({"bad": "x"}, "line 3: the scale .*bad.* can't be read"),
    ],
)
def test_a_scale_that_can_not_be_read_refuses_its_row_in_two_lines(tmp_path, cell, words):
    rows = [{"response": "a"}, {"response": "b", "scale": "1-5"}, {"response": "c", "scale": cell}]
    write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(BadRows, match=words) as refused:
        read_records(tmp_path / "data.jsonl")
    assert len(str(refused.value).splitlines()) == 2
    assert len(read_records(tmp_path / "data.jsonl", skip_bad=True)) == 2
    assert read_records(tmp_path / "data.jsonl", columns={"scale": ""})[2].scale is None


def test_a_date_that_a_spreadsheet_has_made_of_a_scale_is_told_to_be_a_text():
    with pytest.raises(ValueError, match="scale is a date, .*: format its column as text"):
        records_from([{"response": "r", "scale": datetime.datetime(2026, 5, 1)}])


def test_two_scales_of_one_row_are_refused():
    row = {"response": "r", "scale": "1-5", "rubric": {"criteria": "c", "scale": "1-10"}}
    with pytest.raises(ValueError, match="two scales, 1-5 and 1-10: --columns scale= leaves both out"):
        records_from([row])
    assert records_from([row], columns={"scale": ""})[0].scale is None
    assert records_from([{**row, "scale": "1-10"}])[0].scale == TEN


def test_the_scale_of_a_rubric_can_be_left_out_too():
    row = {"response": "r", "rubric": {"criteria": "c", "scale": "from good to bad"}}
    with pytest.raises(ValueError, match="'from good to bad' can't be read: .*: --columns scale= leaves it out"):
        records_from([row])
    [record] = records_from([row], columns={"scale": ""})
    assert record.scale is None and record.rubric == Rubric("c")


def test_a_rubric_for_all_rows_has_no_scale_of_its_own(tmp_path):
    (tmp_path / "data.csv").write_text("response\na\n")
    (tmp_path / "rubric.json").write_text('{"criteria": "c", "scale": "1-10"}')
    arguments = ["--preset", "quick", "--data", "data.csv", "--rubric", str(tmp_path / "rubric.json")]
    with pytest.raises(ValueError, match="has a scale, and is for all rows\n.*--scale"):
        settings = preset_for(parse_options(arguments)).splits
        raise AssertionError(settings)


def test_a_gold_score_off_the_items_own_scale_names_that_scale():
    row = {"response": "r", "score": 7, "scale": "1-5"}
    with pytest.raises(BadRows, match="score 7 is outside the item's scale 1-5$"):
        records_from([row], scale=TEN)
    assert records_from([row], scale=TEN, gold_needed=False)[0].score == 7
    with pytest.raises(BadRows, match="score 7 is outside the scale 1-5: --scale names another"):
        records_from([{"response": "r", "score": 7}], scale=ScoreScale.integers(1, 5))
    with pytest.raises(BadRows, match="score 9 is outside the item's scale 1-5$"):
        records_from([{"response": "r", "score": [3, 9], "scale": "1-5"}])


# Several gold scores, and rows that are written and read again.


@pytest.mark.parametrize(
    "cell, golds", [([3, 4, 4], (3, 4, 4)), ("[3, 4, 4]", (3, 4, 4)), ("[ok, good]", None), (["ok", "GOOD"], (0.5, 1))]
)
def test_several_gold_scores_in_one_cell_are_those_of_annotators(cell, golds):
    scale = GRADES if golds is None or golds[0] == 0.5 else None
    if golds is None:
        with pytest.raises(BadRows, match="can't be read as JSON"):
            records_from([{"response": "r", "score": cell}], scale=scale)
        return
    [record] = records_from([{"response": "r", "score": cell}], scale=scale)
    assert record.gold_scores == golds and record.score == pytest.approx(sum(golds) / len(golds))


def test_gaps_between_annotators_are_left_out_and_a_single_score_is_no_list():
    assert records_from([{"response": "r", "score": [3, None, 5]}])[0].gold_scores == (3.0, 5.0)
    [single] = records_from([{"response": "r", "score": [4]}])
    assert (single.score, single.gold_scores) == (4.0, ())
    assert records_from([{"response": "r", "gold_scores": [1, 2]}])[0].score == 1.5


@pytest.mark.parametrize(
    "scale", [TEN, GRADES, ScoreScale(("a, b", "c=d"), (0, 1)), ScoreScale(("x", "y"), (0, 1 / 3))]
)
def test_scales_and_gold_scores_survive_writing_and_reading(tmp_path, scale):
    records = [
        Record("i", "r", Rubric("c"), score=scale.values[1], id="a", scale=scale, gold_scores=scale.values[:2]),
        Record(prompt="p", score=scale.values[0], id="b", scale=scale),
        Record("i", "r", id="c"),
    ]
    write_records(tmp_path / "records.jsonl", records)
    assert read_records(tmp_path / "records.jsonl") == records
    assert isinstance(record_to_row(records[0])["scale"], dict if "a, b" in scale.labels else str)


# Training.


def test_a_mixture_is_a_scale_that_is_not_the_judges():
    assert not brings_others([Record(), Record(scale=TEN)], TEN)
    assert brings_others([Record(), Record(scale=TEN)], GRADES)
    remapped = TEN.remapped(ScoreScale.integers(0, 9))
    assert not brings_others([Record(scale=TEN)], remapped, TEN)
    with pytest.raises(ValueError, match="--remap is of one scale\nleave --remap out"):
        brings_others([Record(scale=GRADES)], remapped, TEN)


def test_a_remap_gives_the_judge_other_labels_in_the_users_units():
    preset = preset_for(parse_options("--preset t4 --scale 1-10 --remap 0-9".split()))
    seed = preset.on([Record(score=3.0)]).seed
    assert seed["units"] == TEN and seed["scale"].values == TEN.values
    assert seed["scale"].labels == ScoreScale.integers(0, 9).labels
    assert settings_of(parse_options("--preset t4 --remap 0-9".split()))["remap"] == "0-9"
    with pytest.raises(ValueError, match="--remap is of one scale"):
        preset.on([Record(scale=GRADES)])
    spec = make_spec(load_tokenizer("split digits"), seed["scale"], units=seed["units"])
    shown = render(Record("i", "r", Rubric("c", {"10": "the best"})), spec)
    assert "9: the best" in shown.replace("Score 9", "9") and "10" not in shown
    assert JudgeSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("flags, target", [([], "nearest"), (["--target", "soft"], "soft")])
def test_the_target_of_a_score_between_labels_is_an_option(flags, target):
    options = parse_options(["--preset", "24gb", *flags])
    assert preset_for(options).training.target == settings_of(options)["target"] == target


@pytest.mark.parametrize("flag", ["--scale", "--remap"])
def test_a_scale_that_can_not_be_read_is_refused_by_its_flag(flag, capsys):
    with pytest.raises(SystemExit):
        parse_options(["--preset", "quick", flag, "1-"])
    assert f"{flag}: the scale '1-' can't be read" in capsys.readouterr().err


@pytest.mark.training
def test_records_with_scales_of_their_own_make_a_judge_of_any_scale(shared_once, tmp_path):
    seed, records = small_seed_model(shared_once), make_records(8)
    settings = TrainSettings(**{**SHORT, "epochs": 1}, target="soft")
    how: dict[str, Any] = {"seed_model": seed, "settings": settings, "max_length": 128, "load_in_4bit": False}
    mixed = [replace(one, scale=TEN if n % 2 else None, gold_scores=(1.0, 5.0)) for n, one in enumerate(records)]
    spec = JudgeSpec.load(train_adapter(mixed, tmp_path / "mixed", scale=ScoreScale.integers(1, 5), **how))
    assert spec.any_scale and spec.scale == ScoreScale.integers(1, 5) and spec.method["target"] == "soft"
    assert read_json(tmp_path / "mixed" / "stage.json")["dropped"] == {}
    units = ScoreScale.integers(1, 5)
    scale = units.remapped(ScoreScale.integers(0, 4))
    spec = JudgeSpec.load(train_adapter(records, tmp_path / "remap", scale=scale, units=units, **how))
    assert (spec.any_scale, spec.units, spec.scale) == (False, units, scale)
    with pytest.raises(ValueError, match="other settings"):
        train_adapter(records, tmp_path / "remap", scale=scale, **how)
    with pytest.raises(ValueError, match="--remap is of one scale"):
        train_adapter(mixed, tmp_path / "both", scale=scale, units=units, **how)


# Judgements, and what they are worth.


def test_scores_on_several_scales_are_measured_by_their_place_on_each():
    predictions, golds = [2.0, 5.0, 30.0, 90.0, None], [1.0, 5.0, 20.0, 100.0, 3.0]
    ends = [(1.0, 5.0), (1.0, 5.0), (0.0, 100.0), (0.0, 100.0), (1.0, 5.0)]
    found = evaluate(predictions, golds, ends)
    placed = evaluate([0.25, 1.0, 0.3, 0.9, None], [0.0, 1.0, 0.2, 1.0, 0.5])
    for name in ("rmse", "mae", "pearson", "spearman", "coverage"):
        assert found[name] == pytest.approx(placed[name])
    for name, interval in placed["intervals"].items():
        assert found["intervals"][name] == pytest.approx(interval)
    assert found["scales"] == 2 and found["off_scale"] == 0 and found["qwk"] != found["qwk"]


def test_items_on_one_scale_are_measured_in_its_units_as_before():
    predictions, golds = [2.0, 5.0, 3.5], [1.0, 5.0, 3.0]
    each = evaluate(predictions, golds, [(1.0, 5.0), None, (1.0, 5.0)])
    assert each == evaluate(predictions, golds, (1.0, 5.0))
    assert each == {**evaluate(predictions, golds), "off_scale": 0}


def test_a_judged_item_of_an_unknown_scale_among_several_is_refused():
    ends = [(1.0, 5.0), (0.0, 100.0), None]
    with pytest.raises(ValueError, match="1 judged items don't say on which of 2 scales they are\n"):
        evaluate([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], ends)
    assert evaluate([1.0, 2.0, None], [1.0, 2.0, 3.0], ends)["count"] == 2
    with pytest.raises(ValueError, match="got 2 for 3 items"):
        evaluate([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], ends[:2])


def judgement(name: str, score: float, scale: ScoreScale) -> Judgement:
    values = dict(zip(scale.labels, scale.values))
    shares = dict.fromkeys(scale.labels, 1 / len(scale.labels))
    return Judgement(name, score, shares, 1.0, ["So."], [score], 0.5, score, feedback_ids=[[1]], values=values)


def test_judges_are_compared_on_several_scales_by_the_place_of_each_score():
    scales, golds = [TEN, GRADES, TEN, GRADES], [1.0, 1.0, 10.0, 0.0]
    a = [judgement(str(n), gold, scale) for n, (gold, scale) in enumerate(zip(golds, scales))]
    b = [judgement(str(n), gold, scale) for n, (gold, scale) in enumerate(zip([1.9, 0.9, 9.1, 0.1], scales))]
    compared = compare_judges(a, b, golds)
    assert compared["differences"]["rmse"] == pytest.approx(-0.1) and compared["b"]["scales"] == 2
    assert compared["intervals"]["rmse"] == pytest.approx((-0.1, -0.1))


MIXED = [(TEN, 4.0, 5.0), (GRADES, 0.5, 1.0), (ScoreScale.integers(1, 3), 2.0, 2.0)]


def rows_of(mixed: list[tuple[ScoreScale, float, float]]) -> list[dict[str, Any]]:
    rows = [judgement(str(n), score, scale).to_row() for n, (scale, score, _) in enumerate(mixed)]
    return [{**row, "gold": gold} for row, (_, _, gold) in zip(rows, mixed)]


def write(path: Path, rows: list[dict[str, Any]], given: dict[str, dict[str, Any]] | None = None) -> list[str]:
    """The columns of the table that was written."""
    write_table(path, rows, scales_in(rows), given or {row["id"]: {"response": "r"} for row in rows})
    if path.suffix == ".parquet":
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file))


def test_a_table_has_the_labels_of_all_scales_in_order_of_first_appearance(tmp_path):
    rows = rows_of(MIXED)
    columns = write(tmp_path / "out.csv", rows)
    assert [name[2:] for name in columns if name.startswith("p_")] == [*TEN.labels, *GRADES.labels]
    assert {"end_mass", "scale"} <= set(columns)
    cells = next(csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8")))
    assert cells["p_10"] and not cells["p_good"] and cells["scale"] == "1-10"


def test_end_mass_and_scale_stand_only_where_they_say_something(tmp_path):
    plain, ten, words = ([row] for row in rows_of([(ScoreScale.integers(1, 5), 2.0, 2.0), *MIXED[:2]]))
    remapped = rows_of([(TEN.remapped(ScoreScale.integers(0, 9)), 4.0, 5.0)])
    found = [{"end_mass", "scale"} & set(write(tmp_path / "out.csv", rows)) for rows in (plain, ten, words, remapped)]
    assert found == [set(), {"end_mass"}, {"scale"}, {"scale"}]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_table_tells_the_scale_of_each_row_as_the_rows_do(tmp_path, suffix, count):
    odd = ScoreScale(("a, b", "c=d"), (0.0, 1 / 3))
    rows = rows_of([*MIXED[3 - count :], (odd, 0.2, 0.3)] if count == 3 else [(odd, 0.2, 0.3)])
    given = {row["id"]: {"id": row["id"], "scale": "large"} for row in rows}
    columns = write(tmp_path / f"out.{suffix}", rows, given)
    assert suffix == "parquet" or "judge_scale" in columns
    write_rows(tmp_path / "out.jsonl", rows)
    kept = ("score", "gold", "values")
    read = [{name: row[name] for name in kept} for row in read_judged(tmp_path / "out.jsonl")]
    assert read_judged(tmp_path / f"out.{suffix}") == read


def test_evaluate_says_that_scores_on_several_scales_are_measured_from_0_to_1(tmp_path, capsys):
    rows = rows_of(MIXED)
    write_rows(tmp_path / "out.jsonl", [*rows, {**rows[0], "id": "late", "score": None, "values": {}}])
    write(tmp_path / "out.csv", rows)
    for name in ("out.jsonl", "out.csv"):
        assert main(["evaluate", str(tmp_path / name)]) == 0
        header, _, figures, *said = capsys.readouterr().out.splitlines()
        found = dict(zip(map(str.strip, header.split("|")), map(str.strip, figures.split("|"))))
        assert float(found["mae"]) == pytest.approx((1 / 9 + 0.5 + 0) / 3, abs=1e-3)
        assert "the items are on 3 scales: each score counts by its place on its own, from 0 to 1" in said


def test_a_report_of_several_scales_draws_their_places(tmp_path):
    run = Run(tmp_path / "run")
    (run / "judged").mkdir(parents=True)
    write_rows(run / "judged" / "judge-f16.gguf.jsonl", rows_of([*MIXED, (ScoreScale.parse("0-100:10"), 90.0, 80.0)]))
    judged = judged_in_run(run)
    golds, scores, _ = numbers_of(judged.scored)
    assert golds == pytest.approx((4 / 9, 1, 0.5, 0.8)) and scores == pytest.approx((3 / 9, 0.5, 0.5, 0.9))
    assert write_report(run.folder).exists() and (run / "report.png").exists()


# A model without a judge spec.


@pytest.fixture(scope="module")
def instruct(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("instruct")
    make_llama(folder / "model", vocabulary_folder("split digits"), context=600)
    return export_judge("split digits", folder / "model", folder / "instruct.gguf")


@pytest.mark.export
def test_an_untrained_judge_takes_each_items_own_scale(instruct, tmp_path, capsys, caplog):
    own = '"bad=0,ok=0.5,good=1"'
    text = f"response,criteria,score,scale\na,c,7,1-10\nb,c,ok,{own}\nc,c,3,\nd,c,1,1-10\n"
    (tmp_path / "data.csv").write_text(text)
    arguments = ["judge", str(instruct), str(tmp_path / "data.csv"), "--n-cot", "0", "--threads", "1"]
    assert main([*arguments, "-o", str(tmp_path / "out.csv")]) == 0
    rows = read_rows(tmp_path / "out.jsonl")
    assert [list(row["values"]) for row in rows] == [
        list(scale.labels) for scale in (TEN, GRADES, ScoreScale.integers(1, 5), TEN)
    ]
    assert [row["gold"] for row in rows] == [7, 0.5, 3, 1] and not any(row["error"] for row in rows)
    assert main(["evaluate", str(tmp_path / "out.csv")]) == 0
    assert "the items are on 3 scales" in capsys.readouterr().out
    with caplog.at_level(logging.WARNING):
        assert main([*arguments, "--scale", "auto", "-o", str(tmp_path / "auto.jsonl")]) == 0
    assert "scale: 1-5 (gold scores from 3 to 3); --scale names another" in caplog.text


@pytest.mark.export
@pytest.mark.parametrize("scale, words", [("1-", "give its lowest"), ("bad=0", "two labels or more")])
def test_a_scale_that_is_none_is_told_by_judge_in_a_line(instruct, tmp_path, capfd, scale, words):
    (tmp_path / "data.csv").write_text("response,criteria\na,c\n")
    arguments = ["judge", str(instruct), str(tmp_path / "data.csv"), "-o", str(tmp_path / "out.jsonl")]
    assert main([*arguments, "--scale", scale]) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert f"the scale {scale!r} can't be read" in line and words in line
