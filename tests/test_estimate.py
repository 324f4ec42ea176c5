"""How long a run will take: what is measured, and that it takes no longer than it may."""

from __future__ import annotations

import logging
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterable, Sequence

import numpy as np
import pytest
import torch
from stages import SCALE, make_records, small_seed_model, trained_weights

from tract_lite import estimate
from tract_lite.engines import pace
from tract_lite.engines.task import Sample, Task
from tract_lite.estimate import estimate_run
from tract_lite.record import Record
from tract_lite.scale import ScoreTokens
from tract_lite.spec import Sampling
from tract_lite.training.encode import Example
from tract_lite.training.seed_model import add_lora
from tract_lite.training.settings import TrainSettings

SETTINGS = TrainSettings(batch_size=4, micro_batch_size=2)


@pytest.fixture(scope="module")
def asked(shared_once: Callable[..., Path]) -> dict[str, Any]:
    sampling = Sampling(max_new_tokens=5)
    return {"seed_model": small_seed_model(shared_once), "scale": SCALE, "max_length": 96, "sampling": sampling}


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "SECONDS", 0.4)


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


@pytest.mark.export
def test_the_time_of_a_run_is_estimated_and_nothing_is_trained(
    asked: dict[str, Any], info: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    models = []

    def add_and_keep(model: Any, **options: Any) -> Any:
        model = add_lora(model, **options)
        models.append((model, trained_weights(model)))
        return model

    monkeypatch.setattr(estimate, "add_lora", add_and_keep)
    found = estimate_run(make_records(), SETTINGS, parallel=4, **asked)
    assert found["seed_reasonings"] == 0 and min(found["stage"], found["reasonings"]) > 0
    assert "writes the reasonings" not in info.text
    line = r"this run takes about [\d.]+ minutes \(training [\d.]+, reasonings between the stages [\d.]+\)"
    assert re.search(line, info.text)
    [(model, before)] = models
    assert before.keys() == trained_weights(model).keys()
    assert all(torch.equal(weight, before[name]) for name, weight in trained_weights(model).items())
    assert not list(tmp_path.iterdir())


@pytest.mark.export
def test_reasonings_that_the_seed_model_is_to_write_first_are_counted(
    asked: dict[str, Any], info: pytest.LogCaptureFixture
) -> None:
    records = make_records(200)
    bare = [replace(record, feedback=None) for record in records[:50]]
    found = estimate_run([*bare, *records[50:]], SETTINGS, parallel=4, validation=records[:100], **asked)
    # 50 by the seed model, and all 300 by the judge of stage 1.
    assert found["reasonings"] == pytest.approx(found["seed_reasonings"] * 300 / 50)
    assert re.search(r"minutes \(the seed model's reasonings [\d.]+, training [\d.]+, reasonings", info.text)


def test_a_single_stage_is_estimated_without_reasonings(asked: dict[str, Any], info: pytest.LogCaptureFixture) -> None:
    assert list(estimate_run(make_records(), SETTINGS, parallel=None, **asked)) == ["stage"]
    assert "this stage takes about" in info.text and "writes the reasonings" not in info.text
    # The stage itself says this.
    assert "precision:" not in info.text and "learning rate" not in info.text
    assert logging.getLogger("tract_lite.training").level == logging.NOTSET


ENDING = {"held_out": 100, "untrained": 50, "by_file": 100, "checked": 20, "files": 1}


@pytest.mark.export
@pytest.mark.parametrize("direct_share, stages", [(1.0, 1), (0.0, 2)])
def test_what_follows_the_training_is_estimated_too(
    asked: dict[str, Any], info: pytest.LogCaptureFixture, direct_share: float, stages: int
) -> None:
    settings = replace(SETTINGS, direct_share=direct_share)
    found = estimate_run(make_records(), settings, parallel=4, ending=ENDING, **asked)
    assert min(found["export"], found["evaluation"]) > 0 and ("reasonings" in found) == (stages == 2)
    [whole, *parts] = map(float, re.findall(r"(?<= )\d[\d.]*(?=[ ,)])", info.text.rpartition("this run takes")[2]))
    # Ten minutes and more are whole ones.
    assert whole == pytest.approx(sum(parts), abs=0.5 * len(parts)) and len(parts) == stages + 2
    assert whole == pytest.approx((sum(found.values()) + (stages - 1) * found["stage"]) / 60, abs=0.5)


def test_the_time_of_a_run_on_no_usable_record_is_an_error(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no record can be trained on, out of 1: .*no gold score"):
        estimate_run([Record(prompt="The answer")], TrainSettings(), parallel=None, **asked)


# On a slow machine and on a fast one.


def passes_at(speed: float, monkeypatch: pytest.MonkeyPatch, start: float = 0.0) -> tuple[list[int], float]:
    """The tokens of each pass that is measured at so many tokens a second, after `start` seconds,
    and what comes of it."""
    passes: list[int] = []

    def take(trainer: Any, examples: Sequence[Example], pad_id: int) -> float:
        passes.append(sum(len(example.ids) for example in examples))
        assert all(example.ids[example.score_position] == 7 for example in examples)
        return start + passes[-1] / speed

    monkeypatch.setattr(estimate, "_pass_seconds", take)
    tokens = ScoreTokens((), ((7,), (8,)), (3.0, 4.0))
    examples = [
        Example([1] * length + [7, 2], length - 10, length, 3.0, tokens, 0, {0: 1.0}) for length in range(500, 1500, 20)
    ]
    trainer: Any = SimpleNamespace(settings=TrainSettings(micro_batch_size=2))
    return passes, estimate._token_seconds(trainer, examples, 0)


@pytest.mark.parametrize("speed, count", [(1.0, 2), (200.0, 4), (1e4, 9)])
def test_training_is_measured_on_as_much_as_there_is_time_for(
    speed: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, found = passes_at(speed, monkeypatch)
    assert found == pytest.approx(1 / speed)
    assert len(passes) == count and passes[:2] == [estimate.FIRST_TOKENS] * 2
    assert sum(passes[2:]) / speed < 2 * estimate.TRAINING_SECONDS
    # A fast machine reads whole micro-batches of all lengths.
    assert (max(passes) > 2500) == (speed > 1000)


def test_what_a_pass_takes_however_short_it_is_counts_once_for_a_whole_micro_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes, found = passes_at(1000.0, monkeypatch, start=1.2)
    assert max(passes) < 1000
    # Of two examples of about 1,000 tokens.
    assert found == pytest.approx(1 / 1000 + 1.2 / 2000, rel=0.01)


@dataclass(frozen=True)
class _Spec:
    sampling: Sampling = Sampling(max_new_tokens=120)


class TimedEngine:
    """Takes so many seconds for a token that it reads, and for one that it writes."""

    def __init__(self, read: float, written: float, monkeypatch: pytest.MonkeyPatch):
        self.spec: Any = _Spec()
        self.shape = {"parallel": 8}
        self.costs, self.clock = (read, written), 0.0
        monkeypatch.setattr(pace, "perf_counter", lambda: self.clock)

    def run(self, tasks: Iterable[Task]) -> Iterable[tuple[int, list[Sample]]]:
        for number, task in enumerate(tasks):
            # Every third reasoning ends after 30 tokens.
            length = min(self.spec.sampling.max_new_tokens, 10**9 if number % 3 else 30)
            self.clock += self.costs[0] * len(task.prompt) + self.costs[1] * length
            yield number, [Sample([1] * length, length != 30, np.zeros(5))]


@pytest.mark.parametrize("read, written", [(1e-4, 3e-4), (2e-3, 4e-3), (0.02, 0.05)])
def test_a_pace_is_found_in_the_time_that_there_is(
    read: float, written: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = TimedEngine(read, written, monkeypatch)
    prompts = [[1] * length for length in range(300, 400)]
    found = pace.measure_pace(engine, prompts, 4.0)
    assert found.prompt == pytest.approx(read, rel=0.15) and found.token == pytest.approx(written, rel=0.01)
    assert engine.clock < 8
    start = engine.clock
    length = pace.measure_length(engine, prompts, found, 4.0)
    assert engine.clock - start < 10 and 30 <= length <= engine.spec.sampling.max_new_tokens
