"""A run's folder: each thing is made once, and what a stopped call has left is gone on with."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tract_lite import Judgement, Record, Run, Splits, write_records
from tract_lite.data.jsonl import read_json, read_rows, write_json, write_rows

SETTINGS = {"preset": "quick", "epochs": 2.0, "scale": {"labels": ("1", "2")}, "data": None}


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


def test_a_run_goes_on_with_its_own_settings(run: Run) -> None:
    run.begin(SETTINGS)
    run.once("one.txt", write_word, "first")
    run.begin(SETTINGS)
    assert read_json(run / "settings.json") == json.loads(json.dumps(SETTINGS))


def test_other_settings_are_refused_with_a_line_for_each_thing_that_differs(run: Run) -> None:
    run.begin(SETTINGS)
    run.once("one.txt", write_word, "first")
    with pytest.raises(ValueError, match="with other settings") as refused:
        run.begin({**SETTINGS, "epochs": 3.0, "data": "mine.csv", "data_sha256": "ab"})
    lines = [line.strip() for line in str(refused.value).splitlines()[1:]]
    assert lines == [
        "epochs: 2.0 there, 3.0 now",
        "data: None there, 'mine.csv' now",
        "data_sha256: None there, 'ab' now",
    ]
    run.begin(SETTINGS)


def test_other_settings_are_welcome_while_nothing_is_made(run: Run) -> None:
    run.begin(SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run.once("one.txt", stop)
    run.begin({**SETTINGS, "epochs": 3.0})
    assert read_json(run / "settings.json")["epochs"] == 3.0


def test_what_the_settings_made_binds_the_run_even_before_its_data_are_read(run: Run) -> None:
    run.begin(SETTINGS)
    run.once("example", lambda folder: folder.mkdir())
    with pytest.raises(ValueError, match="epochs: 2.0 there, 1.0 now"):
        run.begin({**SETTINGS, "epochs": 1.0})


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
    assert run.counts == {**read, "self_generated": {"kept": 1, "rejected": {"empty": 2}}, "stage1": stage}
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
    assert (run / "log.txt").read_text() == "call 1\ncall 2\n"


def test_a_failure_leaves_the_log_closed(run: Run) -> None:
    before = list(logging.getLogger().handlers)
    with pytest.raises(KeyboardInterrupt), run.log():
        raise KeyboardInterrupt
    assert logging.getLogger().handlers == before
