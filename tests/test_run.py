"""A run's folder: each thing is made once, and what a stopped call has left is gone on with."""

from __future__ import annotations

import json
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tract_lite import Judgement, Record, Run, Splits, write_records
from tract_lite.data.jsonl import read_json, read_rows, write_json, write_rows

SETTINGS = {"preset": "quick", "epochs": 2.0, "scale": "1-5", "data": None, "template": None}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def write_word(word: str, path: Path) -> None:
    path.write_text(word)


def stop(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt


def records(*names: str, score: float | None = 2.0) -> list[Record]:
    return [Record(instruction="Do it.", response=f"Done {name}.", score=score, id=name) for name in names]


def test_a_thing_is_made_once(run: Run) -> None:
    assert run.once("kept/one.txt", write_word, "first") == run / "kept/one.txt"
    run.once("kept/one.txt", pytest.fail)
    assert (run / "kept/one.txt").read_text() == "first"


def test_a_thing_whose_file_is_gone_is_made_again(run: Run) -> None:
    run.once("one.txt", write_word, "first")
    run.once("other.txt", write_word, "other")
    (run / "one.txt").unlink()
    run.once("one.txt", write_word, "second")
    run.once("other.txt", pytest.fail)
    assert (run / "one.txt").read_text() == "second"


def test_a_thing_whose_making_was_stopped_is_made_again_and_finds_what_was_left(run: Run) -> None:
    with pytest.raises(KeyboardInterrupt):
        run.once("one.txt", stop)
    found = []
    run.once("one.txt", lambda path: (found.append(path.read_text()), write_word("whole", path)))
    assert found == ["half"] and (run / "one.txt").read_text() == "whole"
    run.once("one.txt", pytest.fail)


def test_a_folder_is_made_once_too(run: Run) -> None:
    run.once("example", lambda folder: folder.mkdir())
    run.once("example", pytest.fail)
    assert (run / "example").is_dir()


def train(run: Run) -> None:
    """A first stage, as far as its folder tells."""
    (run / "stage1").mkdir()
    write_json(run / "stage1" / "stage.json", {"log": []})


def test_a_run_goes_on_with_its_own_settings(run: Run) -> None:
    run.begin(SETTINGS)
    train(run)
    run.begin(SETTINGS)
    assert read_json(run / "settings.json") == json.loads(json.dumps(SETTINGS))


def test_other_settings_are_refused_with_a_line_for_each_thing_that_differs(run: Run) -> None:
    run.begin({**SETTINGS, "data": "mine.csv", "data_sha256": "ab", "template_sha256": None})
    train(run)
    other = {"epochs": 3.0, "scale": "1-7", "data": "mine.csv", "data_sha256": "cd", "template": "t.jinja"}
    with pytest.raises(ValueError, match="with other settings: choose another output, or these again:") as refused:
        run.begin({**SETTINGS, **other, "template_sha256": "ef"})
    assert [line.strip() for line in str(refused.value).splitlines()[1:]] == [
        "epochs: 2.0 there, 3.0 now",
        "scale: 1-5 there, 1-7 now",
        "data: another content",
        "template: not given there, t.jinja now",
    ]


def test_files_that_were_moved_are_the_same_files(run: Run) -> None:
    run.begin({**SETTINGS, "data": "here/a.csv", "data_sha256": "ab"})
    train(run)
    run.begin({**SETTINGS, "data": "there/b.csv", "data_sha256": "ab"})
    # It was read long ago, and may be gone.
    run.begin({**SETTINGS, "data": "here/a.csv", "data_sha256": None})
    with pytest.raises(ValueError, match="data: here/a.csv there, a/hub-id now"):
        run.begin({**SETTINGS, "data": "a/hub-id", "data_sha256": None})


def test_a_folder_that_was_moved_and_renamed_is_the_same_run(run: Run, tmp_path: Path) -> None:
    run.begin(SETTINGS)
    train(run)
    moved = Run(run.folder.rename(tmp_path / "ein anderer Öfen"))
    moved.begin(SETTINGS)
    assert list(moved.stages()) == ["stage1"]


def test_other_settings_are_welcome_while_nothing_is_trained_and_data_are_read_anew(run: Run) -> None:
    run.begin(SETTINGS)
    run.data(splits_of, "old")
    run.keep_judged("true mean", [Judgement("held", score=1.5)])
    run.begin(SETTINGS)
    run.data(pytest.fail)
    run.begin({**SETTINGS, "epochs": 3.0})
    assert read_json(run / "settings.json")["epochs"] == 3.0
    assert [record.id for record in run.data(splits_of, "new").training] == ["new"]
    assert not (run / "judged").exists()


def test_settings_that_can_not_be_read_are_replaced_while_nothing_is_trained(run: Run) -> None:
    run.begin(SETTINGS)
    (run / "settings.json").write_text("{")
    run.begin(SETTINGS)
    train(run)
    (run / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json is damaged"):
        run.begin(SETTINGS)


@pytest.mark.parametrize(
    "made",
    [
        "stage1/stage.json",
        "stage2/checkpoint-8/complete.json",
        "seed_reasonings.jsonl",
        "self_generated.rejected.jsonl",
    ],
)
def test_what_a_model_has_learnt_or_written_binds_the_run(run: Run, made: str) -> None:
    run.begin(SETTINGS)
    (run / made).parent.mkdir(parents=True, exist_ok=True)
    (run / made).write_text("{}\n")
    with pytest.raises(ValueError, match="epochs: 2.0 there, 1.0 now"):
        run.begin({**SETTINGS, "epochs": 1.0})
    (run / made).write_text("")
    run.begin({**SETTINGS, "epochs": 1.0})


LATER_SETTINGS: dict[str, Any] = {
    "parallel": 8,
    "micro_batch_size": 2,
    "base": "4bit",
    "quantization": ("q8_0",),
    "gguf_items": 50,
}


@pytest.mark.parametrize(
    "change", [{"parallel": 4}, {"micro_batch_size": 1}, {"quantization": ("f16", "q8_0")}, {"gguf_items": 10}]
)
def test_what_concerns_later_steps_alone_may_change_and_what_was_measured_is_measured_anew(
    run: Run, change: dict[str, Any]
) -> None:
    run.begin({**SETTINGS, **LATER_SETTINGS})
    train(run)
    write_json(run / "metrics.json", {"rows": {}})
    run.begin({**SETTINGS, **LATER_SETTINGS})
    assert (run / "metrics.json").exists()
    run.begin({**SETTINGS, **LATER_SETTINGS, **change})
    assert not (run / "metrics.json").exists()
    settings = read_json(run / "settings.json")
    assert settings == json.loads(json.dumps({**SETTINGS, **LATER_SETTINGS, **change}))


def test_gguf_files_of_another_base_are_not_taken_for_those_of_this_one(run: Run) -> None:
    run.begin({**SETTINGS, **LATER_SETTINGS})
    train(run)
    run.begin({**SETTINGS, **LATER_SETTINGS, "base": "16bit"})
    (run / "judge-q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="has judge-q8_0.gguf, made with the base 16bit: delete .* the base 4bit"):
        run.begin({**SETTINGS, **LATER_SETTINGS})
    (run / "judge-q8_0.gguf").unlink()
    run.begin({**SETTINGS, **LATER_SETTINGS})
    assert read_json(run / "settings.json")["base"] == "4bit"


def test_the_word_of_a_file_that_is_gone_goes_too(run: Run) -> None:
    run.begin(SETTINGS)
    train(run)
    for name in ("f16", "q8_0"):
        (run / f"judge-{name}.gguf").write_bytes(b"GGUF")
        run.keep_judged(f"judge-{name}.gguf", [Judgement("a", score=1.5)])
    run.keep_judged("stage 1", [Judgement("a", score=1.5)])
    write_json(run / "metrics.json", {"rows": {}})
    write_json(run / "parity.json", {"judge-f16.gguf": {"records": 1}, "judge-q8_0.gguf": {"records": 2}})
    (run / "judge-f16.gguf").unlink()
    run.begin(SETTINGS)
    assert read_json(run / "parity.json") == {"judge-q8_0.gguf": {"records": 2}}
    assert sorted(path.name for path in (run / "judged").iterdir()) == ["judge-q8_0.gguf.jsonl", "stage 1.jsonl"]
    assert not (run / "metrics.json").exists()


def splits_of(*names: str, validation: tuple[str, ...] = ()) -> Splits:
    return Splits(records(*names), records(*validation), records("held"), {"items": 9, "bad_rows": 1})


def test_data_are_the_same_records_at_every_call(run: Run) -> None:
    first = run.data(splits_of, "a", "b", validation=("v",))
    again = run.data(pytest.fail)
    assert first == again
    assert [record.id for record in again.training] == ["a", "b"]
    assert again.validation == records("v") and again.held_out == records("held")
    assert Run(run.folder).data(pytest.fail) == first


def test_data_without_validation_are_read_as_such(run: Run) -> None:
    assert run.data(splits_of, "a").validation == []
    assert run.data(pytest.fail).validation == []


def test_data_that_were_stopped_half_way_are_read_anew(run: Run) -> None:
    def half() -> Splits:
        write_records(run / "training.jsonl", records("old"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.data(half)
    assert [record.id for record in run.data(splits_of, "new").training] == ["new"]


def test_counts_come_from_the_files_that_are_there(run: Run) -> None:
    assert run.counts == {}
    run.data(splits_of, "a", "b", validation=("v",))
    read = {"items": 9, "bad_rows": 1, "training_records": 2, "validation_records": 1, "held_out_items": 1}
    assert run.counts == read
    write_records(run / "self_generated.jsonl", records("a"))
    write_rows(run / "self_generated.rejected.jsonl", [{"reason": "empty"}, {"reason": "empty"}])
    stage = {"records": 2, "examples": 2, "dropped": {}, "validation": 1, "kept_step": 4}
    (run / "stage1").mkdir()
    write_json(run / "stage1" / "stage.json", {**stage, "log": [], "settings": {}})
    assert run.counts == {
        **read,
        "self_generated": {"kept": 1, "shortened": 0, "rejected": {"empty": 2}},
        "stage1": stage,
    }
    write_records(run / "self_generated.jsonl", records("a", "b"))
    assert run.counts["self_generated"]["kept"] == 2
    assert list(run.stages()) == ["stage1"]


def test_a_file_made_elsewhere_is_kept_in_the_folder(run: Run, tmp_path: Path) -> None:
    run.begin(SETTINGS)
    (tmp_path / "judge-q8_0.gguf").write_bytes(b"GGUF")
    kept = run.keep(tmp_path / "judge-q8_0.gguf")
    assert run.keep(kept) == kept == run / "judge-q8_0.gguf"
    assert kept.read_bytes() == b"GGUF" and run.gguf_files() == [kept]


def test_what_somebody_says_of_the_items_is_kept_beside_the_judges(run: Run) -> None:
    run.keep_judged("true mean", [Judgement("a", score=1.5)])
    (row,) = read_rows(run / "judged" / "true mean.jsonl")
    assert (row["id"], row["score"]) == ("a", 1.5)


def test_the_log_keeps_the_messages_of_all_calls(run: Run) -> None:
    logger = logging.getLogger("somewhere")
    logger.setLevel(logging.INFO)
    for number in (1, 2):
        with run.log():
            logger.info("call %d", number)
        logger.info("outside")
    lines = (run / "log.txt").read_text().splitlines()
    assert [line[20:] for line in lines] == ["call 1", "call 2"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line[:20]) for line in lines)


def test_details_are_in_the_log_alone_and_warnings_on_the_console_too(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ("run", logging.INFO), ("export.parity", logging.INFO), ("export.parity", logging.WARNING)
    logging.getLogger("tract_lite").setLevel(logging.INFO)
    try:
        with run.log():
            for part, level in said:
                logging.getLogger(f"tract_lite.{part}").log(level, "%s at %d", part, level)
    finally:
        logging.getLogger("tract_lite").setLevel(logging.NOTSET)
    assert capsys.readouterr().err.splitlines() == ["run at 20", "export.parity at 30"]
    assert len((run / "log.txt").read_text().splitlines()) == 3


def test_a_failure_leaves_the_log_closed_and_its_traceback_inside(run: Run) -> None:
    before = list(logging.getLogger().handlers)
    with pytest.raises(RuntimeError), run.log():
        raise RuntimeError("no kernels for ä\udcff")
    with pytest.raises(KeyboardInterrupt), run.log():
        raise KeyboardInterrupt
    assert logging.getLogger().handlers == before
    lines = (run / "log.txt").read_text(encoding="utf-8").splitlines()
    assert (lines[0][20:], lines[-2], lines[-1][20:]) == (
        "stopped by an error",
        r"RuntimeError: no kernels for ä\udcff",
        "stopped",
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_that_can_not_be_written_says_nothing(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run.folder.mkdir()
    (run / "log.txt").symlink_to("/dev/full")
    logger = logging.getLogger("somewhere")
    with suppress(OSError), run.log():
        logger.warning("lost")
    assert "Traceback" not in capfd.readouterr().err
