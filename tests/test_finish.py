"""The end of a run: who judges the held-out items, what is taken as it is, what is written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import WritingEngine, load_tokenizer

from tract_lite import (
    Judge,
    Judgement,
    Record,
    Rubric,
    Run,
    ScoreScale,
    compare_judges,
    evaluate,
    finish_run,
    make_spec,
    write_records,
)
from tract_lite.data.jsonl import read_json, read_rows, write_json
from tract_lite.report.finish import Measured
from tract_lite.report.rows import TRAINING_MEAN
from tract_lite.vocabulary import TransformersVocabulary

SCALE = ScoreScale.integers(1, 5)
READINGS = ("sampled label", "most likely label", "CoT-RAIL")


class NamedEngine(WritingEngine):
    """Tells its model, as engines do, and counts what it is asked."""

    def __init__(self, model: str):
        tokenizer = load_tokenizer("spm")
        super().__init__(make_spec(tokenizer, SCALE), TransformersVocabulary(tokenizer))
        self.identity, self.shape = {"model": model}, {"parallel": 4}

    def close(self) -> None:
        """The prompts are kept, to be counted."""


class Opened:
    """Opens judges of one model, and says what they were asked."""

    def __init__(self, model: str):
        self.model, self.engines = model, []

    def __call__(self) -> Judge:
        self.engines.append(NamedEngine(self.model))
        return Judge(self.engines[-1])

    @property
    def prompts(self) -> list[str]:
        return [prompt for engine in self.engines for prompt in engine.prompts]


def items(*texts: str) -> list[Record]:
    return [
        Record("Do it.", text, Rubric("Is it good?"), score=1.0 + n % 5, id=f"item {n}") for n, text in enumerate(texts)
    ]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    (run / "stage2" / "adapter").mkdir(parents=True)
    NamedEngine("any").spec.save(run / "stage2" / "adapter")
    return run


def finish(run: Run, held_out: list[Record], judges: dict[str, Any], **options: Any) -> dict[str, Any]:
    whole = {name: judge if isinstance(judge, Measured) else Measured(judge) for name, judge in judges.items()}
    return finish_run(run, held_out, whole, scale=SCALE, **options)


def judged(run: Run, name: str) -> list[Judgement]:
    return list(map(Judgement.from_row, read_rows(run / "judged" / f"{name}.jsonl")))


def test_each_judge_has_a_row_for_each_reading_of_its_distributions(run: Run) -> None:
    held_out = items(*"abcdefghij")
    rows = finish(run, held_out, {"one": Opened("1"), "two": Opened("2")})["rows"]
    assert list(rows) == [f"{name}, {reading}" for name in ("one", "two") for reading in READINGS]
    said, golds = judged(run, "one"), [item.score for item in held_out]
    of_scores = evaluate([one.score for one in said], golds)
    assert rows["one, CoT-RAIL"] == {**of_scores, "intervals": rows["one, CoT-RAIL"]["intervals"]}
    assert {name: tuple(ends) for name, ends in rows["one, CoT-RAIL"]["intervals"].items()} == of_scores["intervals"]
    assert rows["one, most likely label"]["rmse"] == evaluate([one.mode for one in said], golds)["rmse"]
    assert rows["one, sampled label"]["rmse"] != rows["one, CoT-RAIL"]["rmse"]


def test_the_intervals_hold_the_figures_and_the_files_the_gold_scores(run: Run) -> None:
    held_out = items(*"abcdefghij")
    row = finish(run, held_out, {"one": Opened("1")})["rows"]["one, CoT-RAIL"]
    for name, (low, high) in row["intervals"].items():
        assert low <= row[name] <= high and low < high
    assert [row["gold"] for row in read_rows(run / "judged" / "one.jsonl")] == [item.score for item in held_out]
    same = compare_judges(judged(run, "one"), judged(run, "one"), [item.score for item in held_out])
    assert same["differences"]["rmse"] == 0


def test_a_sampled_label_is_drawn_by_its_probability(run: Run) -> None:
    held_out = items(*map(str, range(400)))
    finish(run, held_out, {"one": Opened("1")})
    rows = read_json(run / "metrics.json")["rows"]
    # The variance of the draw comes on top of the error of the mean that it is drawn around.
    variance = sum(one.std**2 for one in judged(run, "one")) / len(held_out)
    excess = rows["one, sampled label"]["rmse"] ** 2 - rows["one, CoT-RAIL"]["rmse"] ** 2
    assert excess == pytest.approx(variance, rel=0.35)


def test_what_others_said_stands_first_and_is_taken_as_it_is(run: Run) -> None:
    held_out = items(*"abcde")
    run.keep_judged("true mean", [Judgement(item.id, score=item.score) for item in reversed(held_out)])
    run.keep_judged("few", [Judgement(held_out[0].id, score=3.0)])
    rows = finish(run, held_out, {"one": Opened("1")})["rows"]
    assert list(rows)[:2] == ["few", "true mean"]
    assert rows["true mean"]["rmse"] == 0 and rows["true mean"]["coverage"] == 1
    assert rows["few"]["coverage"] == 0.2


def test_judges_that_are_opened_in_the_same_way_are_opened_once_and_named_by_how_they_judge(run: Run) -> None:
    seed = Opened("seed")
    judges = {"direct": Measured(seed, None, 0, True), "reasoned": Measured(seed, 3, 1, True), "one": Opened("1")}
    rows = finish(run, items(*"abcdef"), judges)["rows"]
    assert len(seed.engines) == 1 and len(seed.prompts) == 9
    assert [name for name in rows if name.endswith("RAIL")] == ["direct, RAIL", "reasoned, CoT-RAIL", "one, CoT-RAIL"]
    assert rows["one, CoT-RAIL"]["better_by"].keys() == {"direct, RAIL", "reasoned, CoT-RAIL"}


def test_a_judge_of_fewer_items_is_asked_no_more(run: Run) -> None:
    gguf = Opened("gguf")
    rows = finish(run, items(*"abcdef"), {"one": Opened("1"), "judge.gguf": Measured(gguf, 2)})["rows"]
    assert len(gguf.prompts) == 2
    assert (rows["judge.gguf, CoT-RAIL"]["count"], rows["one, CoT-RAIL"]["count"]) == (2, 6)


def test_a_stopped_end_goes_on_without_opening_a_judge_whose_rows_are_all_there(run: Run) -> None:
    held_out = items(*"abcdefgh", "STOP")
    first, second = Opened("1"), Opened("2")
    finish(run, held_out[:8], {"one": first})
    (run / "metrics.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        finish(run, held_out, {"two": second})
    assert not (run / "metrics.json").exists() and len(judged(run, "two")) == 8
    before = judged(run, "two")[:8]
    calm = [*held_out[:8], replace(held_out[8], response="calm")]
    finish(run, held_out[:8], {"one": pytest.fail, "two": pytest.fail})
    (run / "metrics.json").unlink()
    again = Opened("2")
    rows = finish(run, calm, {"two": again})["rows"]
    assert len(again.prompts) == 1 and judged(run, "two")[:8] == before
    assert rows["two, CoT-RAIL"]["count"] == 9


def test_going_on_gives_the_figures_of_one_go(run: Run, tmp_path: Path) -> None:
    held_out = items(*"abcdefgh")
    finish(run, held_out[:3], {"one": Opened("1")})
    (run / "metrics.json").unlink()
    other = Run(tmp_path / "other")
    (other / "stage2" / "adapter").mkdir(parents=True)
    NamedEngine("any").spec.save(other / "stage2" / "adapter")
    assert finish(run, held_out, {"one": Opened("1")})["rows"] == finish(other, held_out, {"one": Opened("1")})["rows"]


def test_rows_of_another_judge_are_refused(run: Run) -> None:
    finish(run, items(*"ab"), {"one": Opened("1")})
    (run / "metrics.json").unlink()
    with pytest.raises(ValueError, match="model: 1 there, 2 now"):
        finish(run, items(*"abc"), {"one": Opened("2")})


def test_a_finished_run_only_writes_its_pages_again(run: Run) -> None:
    metrics = finish(run, items(*"abcde"), {"one": Opened("1")})
    for name in ("report.md", "README.md"):
        (run / name).unlink()
    assert finish(run, items(*"abcde"), {"one": pytest.fail}) == read_json(run / "metrics.json")
    assert metrics["rows"].keys() == read_json(run / "metrics.json")["rows"].keys()
    assert (run / "report.md").exists() and (run / "README.md").exists()


def test_items_that_can_not_be_judged_are_counted_and_asked_again(run: Run) -> None:
    held_out = items(*"abcd", "LONG")
    row = finish(run, held_out, {"one": Opened("1")})["rows"]["one, CoT-RAIL"]
    assert (row["count"], row["coverage"]) == (4, 0.8)
    (run / "metrics.json").unlink()
    again = Opened("1")
    finish(run, held_out, {"one": again})
    assert len(again.prompts) == 1 and "LONG" in again.prompts[0]


def test_items_without_an_id_are_known_by_what_is_judged(run: Run) -> None:
    held_out = [replace(item, id=None) for item in items(*"abcde")]
    first = finish(run, held_out, {"one": Opened("1")})["rows"]
    (run / "metrics.json").unlink()
    assert finish(run, held_out, {"one": pytest.fail})["rows"] == first


def test_the_metrics_hold_parity_and_counts_and_every_card_is_written(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parity = {
        "judge-q8_0.gguf": {
            "records": 2, "different_prompts": 0, "mean_difference": 0.01, "largest_difference": 0.02
        }
    }  # fmt: skip
    write_json(run / "parity.json", parity)
    write_json(run / "counts.json", {"items": 70})
    (run / "judge-q8_0.gguf").touch()
    (tmp_path / "merged").mkdir()
    cards = [tmp_path / "merged", tmp_path / "missing"]
    metrics = finish(run, items(*"abcde"), {"one": Opened("1")}, cards=cards)
    assert metrics["parity"] == parity and metrics["counts"] == {"items": 70}
    assert (tmp_path / "merged" / "README.md").exists() and not (tmp_path / "missing").exists()
    shown = capsys.readouterr().out
    assert "| one, CoT-RAIL " in shown and f"judge:  {run / 'judge-q8_0.gguf'}" in shown
    assert f"report: {run / 'report.html'}" in shown
    assert (run / "report.html").exists() and "The judge is off by" in shown


def train_on(run: Run, *golds: float) -> None:
    write_records(run / "training.jsonl", [Record("Do it.", str(gold), score=gold) for gold in golds])


def test_always_guessing_the_mean_of_the_training_is_a_row_that_all_others_are_compared_with(run: Run) -> None:
    held_out = items(*"abcdefghij")
    train_on(run, 1, 2, 4, 5, 5)
    rows = finish(run, held_out, {"one": Opened("1")})["rows"]
    golds = [item.score for item in held_out]
    assert list(rows)[0] == TRAINING_MEAN and rows[TRAINING_MEAN]["count"] == 10
    assert rows[TRAINING_MEAN]["mae"] == evaluate([3.4] * 10, golds)["mae"]
    compared = compare_judges(judged(run, "one"), [3.4] * 10, golds)
    gained = rows["one, CoT-RAIL"]["better_by"][TRAINING_MEAN]
    for name in ("rmse", "mae"):
        assert gained[name] == pytest.approx(-compared["differences"][name])
        assert sorted(-end for end in gained["intervals"][name]) == pytest.approx(compared["intervals"][name])
    assert "better_by" not in rows[TRAINING_MEAN]


def test_an_untrained_seed_model_is_compared_with_and_is_never_the_judge(run: Run) -> None:
    train_on(run, 1, 5)
    held_out = items(*"abcdef")
    judges = {"stage 1": Measured(Opened("1"), 2), "untrained": Measured(Opened("2"), is_baseline=True)}
    metrics = finish(run, held_out, judges)
    assert metrics["judge"] == "stage 1" and metrics["scale"] == [1.0, 5.0]
    assert list(metrics["rows"]["stage 1, CoT-RAIL"]["better_by"]) == [TRAINING_MEAN, "untrained, CoT-RAIL"]
    assert list(metrics["rows"]["untrained, CoT-RAIL"]["better_by"]) == [TRAINING_MEAN]
    assert metrics["rows"]["stage 1, CoT-RAIL"]["better_by"]["untrained, CoT-RAIL"]["count"] == 2


def test_the_verdict_is_about_the_last_of_the_judges_with_the_most_items(run: Run) -> None:
    judges = {"stage 1": Opened("1"), "stage 2": Opened("2"), "judge.gguf": Measured(Opened("3"), 2)}
    assert finish(run, items(*"abcd"), judges)["judge"] == "stage 2"
    (run / "metrics.json").unlink()
    judges |= {"judge.gguf": Measured(pytest.fail, 2), "judge-b.gguf": Measured(Opened("4"), 9)}
    assert finish(run, items(*"abcd"), {**judges, "stage 1": pytest.fail})["judge"] == "judge-b.gguf"


def test_a_judge_is_asked_with_as_many_reasonings_as_it_is_measured_with(run: Run) -> None:
    judges = {"reasoned": Opened("1"), "direct": Measured(Opened("2"), n_cot=0)}
    finish(run, items(*"abcd"), judges)
    assert all(one.feedback for one in judged(run, "reasoned"))
    assert not any(one.feedback for one in judged(run, "direct"))


def test_the_console_shows_one_row_of_each_judge_and_says_that_fewer_items_were_judged(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    train_on(run, 1, 5)
    finish(run, items(*"abcdef"), {"one": Opened("1"), "judge.gguf": Measured(Opened("2"), 2)})
    shown = capsys.readouterr().out
    assert "| one, CoT-RAIL " in shown and "sampled label" not in shown and "most likely label" not in shown
    assert "judges with a smaller n have judged the first of the held-out items only" in shown
    assert max(map(len, shown.partition("\n\n")[0].splitlines())) <= 110
    assert "sampled label" in (run / "report.html").read_text(encoding="utf-8")
