"""The tasks of the evidence: their items, their seed model, and the rows of each grid."""

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import example

from tract_lite import (
    Record,
    Sampling,
    ScoreScale,
    TrainSettings,
    evaluate,
    make_toy_seed_model,
    read_records,
    small_seed_model,
    split_records,
)

# Where reasonings come from, beside the rows of a grid: the data; the seed model before any
# training, as it is asked in use, or shown the gold score.
ANNOTATORS, SEED_MODEL, SHOWN = "annotators", "seed model", "seed model shown the score"
RAFT, STAGE_1, TRACT = "RAFT, no reasoning", "stage 1", "TRACT"
DIRECT: dict[str, Any] = {"direct_share": 1.0}
CE: dict[str, Any] = {"raft_weight": 0.0}


@dataclass(frozen=True)
class Row:
    """A judge of the grid.

    `learns_from`: whose reasonings, those of two rows by halves as "ONE + OTHER"; None: it learns
    without any. `start`: the row whose adapter it goes on from, in place of a new one. `judged_by`:
    the judge of another row, or the seed model, read in another way.
    """

    learns_from: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None
    n_cot: int = 1
    judged_by: str | None = None


@dataclass(frozen=True)
class Task:
    """What is judged, and how.

    `asked`: the seed model, and how it is asked. `best`: the lowest RMSE that a judge can have,
    where it is known.
    """

    name: str
    training: Sequence[Record]
    validation: Sequence[Record]
    test: Sequence[Record]
    asked: Mapping[str, Any]
    settings: TrainSettings
    rows: Mapping[str, Row]
    seeds: Sequence[int] = (1, 2, 3)
    best: float | None = None

    @property
    def scale(self) -> ScoreScale:
        return self.asked["scale"]


_UNTRAINED = {"untrained, direct": Row(n_cot=0, judged_by=SEED_MODEL), "untrained": Row(judged_by=SEED_MODEL)}
_MAIN = {"RAFT, no reasoning": Row(settings=DIRECT, n_cot=0), STAGE_1: Row(ANNOTATORS), TRACT: Row(STAGE_1)}
EXAMPLE_ROWS = {
    **_UNTRAINED,
    "CE, no reasoning": Row(settings=DIRECT | CE, n_cot=0),
    "CE, annotators' reasonings": Row(ANNOTATORS, CE),
    "CE, own reasonings": Row("CE, annotators' reasonings", CE),
    **_MAIN,
    "stage 2 from stage 1": Row(STAGE_1, start=STAGE_1),
    "mixed reasonings": Row(f"{ANNOTATORS} + {STAGE_1}"),
    "score token not in CE": Row(STAGE_1, {"ce_on_score": False}),
    **{f"raft_weight {weight:g}": Row(STAGE_1, {"raft_weight": weight}) for weight in (0.1, 0.3, 3, 10)},
    **{f"{TRACT}, n_cot {n}": Row(n_cot=n, judged_by=TRACT) for n in (2, 4, 8, 16)},
}
# Annotators wrote nothing: what takes their place is the question.
_OWN = "own reasonings (stage 1)"
STS_ROWS = {
    **_UNTRAINED,
    RAFT: Row(settings=DIRECT, n_cot=0),
    _OWN: Row(SEED_MODEL),
    "own reasonings, after RAFT": Row(SEED_MODEL, start=RAFT),
    "reasonings shown the score": Row(SHOWN),
    TRACT: Row(_OWN),
}
VICUNA_ROWS = {**_UNTRAINED, **_MAIN}
_QUICK_ROWS = {name: EXAMPLE_ROWS[name] for name in ("CE, annotators' reasonings", "CE, own reasonings", *_MAIN)}
# The instruction inside a prompt of the Prometheus format.
_INSTRUCTION = re.compile(r"instruction to evaluate:(.*?)###", re.DOTALL)


def example_task(items: tuple[int, int] = (2600, 1000), steps: int = 500, *, quick: bool = False) -> Task:
    """The built-in example, of which the true distribution of each score is known: a toy.

    `items` to train on and to judge; `steps`: those of the seed model.
    """
    count, held_out = items
    judged = example.make_items(held_out, example.HELD_OUT_SEED)
    training = [item.record for item in example.make_items(count, example.TRAINING_SEED)]
    rest, validation = split_records(training, min(0.25, 100 / count))
    asked: dict[str, Any] = {"template": example.TEMPLATE, "max_length": 256, "sampling": Sampling(max_new_tokens=96)}
    made = make_toy_seed_model(example.pretraining_records(), example.SCALE, vocabulary_size=800, steps=steps, **asked)
    best = evaluate([item.mean for item in judged], [item.record.score or 0.0 for item in judged])["rmse"]
    return Task(
        "quick" if quick else "example",
        rest,
        validation,
        [item.record for item in judged],
        {"seed_model": made, "scale": example.SCALE, **asked},
        TrainSettings(batch_size=16, micro_batch_size=16, learning_rate=6e-3),
        _QUICK_ROWS if quick else EXAMPLE_ROWS,
        (1,) if quick else (1, 2, 3, 4, 5),
        round(best, 4),
    )


def sts_task(path: str) -> Task:
    """Pairs of sentences with human scores from 0 to 5, no reasonings: a small real seed model."""
    scale = ScoreScale.parse("0-5")
    rest, validation = split_records(read_records(path, scale=scale), 0.1)
    test = read_records(Path(path).with_name("sts_test.jsonl"), scale=scale)
    return Task("sts", rest[:600], validation, test, _small_seed(scale, 1024, 60), _SMALL_SETTINGS, STS_ROWS)


def vicuna_task(path: str) -> Task:
    """80 instructions with 4 answers each, judged by GPT-4 three times: a small real seed model.

    Instructions that are tested on are not trained on.
    """
    scale = ScoreScale.parse("1-5")
    parts: dict[str, list[Record]] = {}
    for record in read_records(path, scale=scale):
        found = _INSTRUCTION.search(record.prompt or "")
        if not found:
            raise ValueError(f"{path}: item {record.id} has no instruction\ntake vicuna_eval.json as it is published")
        parts.setdefault(found[1].strip(), []).append(record)
    groups = list(parts.values())
    random.Random(0).shuffle(groups)
    tenth = len(groups) // 10
    chosen = groups[tenth * 4 :], groups[tenth * 3 : tenth * 4], groups[: tenth * 3]
    training, validation, test = ([record for group in part for record in group] for part in chosen)
    pairs = [record.pairs()[0] for record in training], [record.pairs()[0] for record in validation]
    return Task("vicuna", *pairs, test, _small_seed(scale, 2048, 200), _SMALL_SETTINGS, VICUNA_ROWS, (1,))


_SMALL_SETTINGS = TrainSettings(epochs=3, micro_batch_size=4, learning_rate=1e-3, save_every=75)


def _small_seed(scale: ScoreScale, max_length: int, max_new_tokens: int) -> dict[str, Any]:
    sampling = Sampling(max_new_tokens=max_new_tokens)
    return {"seed_model": small_seed_model(), "scale": scale, "max_length": max_length, "sampling": sampling}


TASKS: dict[str, Callable[[Any], Task]] = {
    "example": lambda _: example_task(),
    "quick": lambda _: example_task((640, 250), 200, quick=True),
    "sts": sts_task,
    "vicuna": vicuna_task,
}
