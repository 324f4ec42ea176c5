"""The paper's grid: each part of the method with and without, over several random seeds.

    python recipes/evidence.py --quick                    # the example, small: 20 minutes
    python recipes/evidence.py --seeds 1 2 3 4 5          # the example, whose optimum is known
    python recipes/evidence.py --sts sts_train.jsonl      # human scores, sts_test.jsonl beside it
    python recipes/evidence.py --vicuna vicuna_eval.json  # GPT-4's reasonings and scores
    python recipes/evidence.py --page                     # docs/evidence.md, from the cells alone

A cell is one row of the grid with one random seed: a small JSON file in docs/evidence, written as
soon as it is measured, and not measured again. What it needs (adapters, reasonings) is kept in
--out, shared by its rows, and goes on where it was stopped. `--rows` takes a part of the grid.
"""

import argparse
import json
import logging
import math
import os
import platform
import random
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, Callable, Mapping, Sequence

from evidence_page import write_page
from evidence_tasks import ANNOTATORS, SEED_MODEL, SHOWN, TASKS, Task

from tract_lite import Judgement, Record, Rubric, evaluate, generate_cots, reasoning_judge, train_adapter

logger = logging.getLogger("evidence")

CELLS = Path(__file__).resolve().parents[1] / "docs" / "evidence"
# A reasoning that was written with the gold score in sight is kept where the score after it is as
# near, in shares of the scale's width.
AGREES = 0.1
FIGURES = ("pearson", "spearman", "rmse", "mae", "count")


@dataclass(frozen=True)
class Grid:
    """The rows of a task with one random seed, and the folder of what they share."""

    task: Task
    random_seed: int
    folder: Path

    def adapter(self, name: str) -> Path:
        """The adapter of a row, trained unless it is there."""
        row = self.task.rows[name]
        training = self.reasoned(row.learns_from, self.task.training)
        settings = replace(self.task.settings, seed=self.random_seed, **row.settings)
        return train_adapter(
            training,
            self.folder / _file_name(name),
            settings=settings,
            validation=self.reasoned(row.learns_from, self.task.validation),
            gradient_checkpointing=False,
            start=self.adapter(row.start) if row.start else None,
            **self.task.asked,
        )

    def reasoned(self, source: str | None, records: Sequence[Record]) -> list[Record]:
        """Those of the records that have a reasoning of this source, with it; None: as they are."""
        if source in (None, ANNOTATORS):
            return list(records)
        if source == SHOWN:
            found = self._shown()
        elif " + " in (source or ""):
            # Half of the records of each, always the same.
            first, second = str(source).split(" + ")
            odd = {record.id for record in random.Random(0).sample(list(records), len(records) // 2)}
            halves = ((first, lambda one: one.id in odd), (second, lambda one: one.id not in odd))
            return [one for part, keep in halves for one in self.reasoned(part, records) if keep(one)]
        else:
            found = self._written(str(source), self._all, self.folder / f"{_file_name(str(source))}.jsonl")
        return [found[str(record.id)] for record in records if str(record.id) in found]

    @property
    def _all(self) -> list[Record]:
        return [*self.task.training, *self.task.validation]

    def _written(self, writer: str, records: Sequence[Record], out: Path) -> dict[str, Record]:
        """By id, the records with the reasonings that the writer's judge has for them."""
        with self.open(writer) as judge:
            kept, rejected = generate_cots(judge, records, out, self.random_seed)
        logger.info("%s: %d reasonings, %d rejected %s", out.name, len(kept), rejected.total(), dict(rejected))
        return {str(record.id): record for record in kept}

    def _shown(self) -> dict[str, Record]:
        """What the seed model writes that was shown the gold score, where its own score agrees."""
        golds = {str(record.id): record for record in self._all}
        shown = [show_score(record) for record in self._all]
        out = self.folder / f"{_file_name(SHOWN)}.jsonl"
        with self.open(SEED_MODEL) as judge:
            judged = list(judge.score_many(shown, seed=self.random_seed, resume=out))
        width = max(self.task.scale.values) - min(self.task.scale.values)
        found = {}
        for one in judged:
            record = golds[str(one.id)]
            near = abs(one.normalised_score - float(record.score or 0)) <= AGREES * width
            if not one.error and not one.truncated and one.feedback[0] and near:
                found[str(one.id)] = replace(record, feedback=one.feedback[0], feedback_ids=tuple(one.feedback_ids[0]))
        logger.info("%s: %d of %d reasonings lead to about the gold score", SHOWN, len(found), len(judged))
        return found

    def open(self, name: str) -> Any:
        """The judge of a row, or of the seed model before any training."""
        if name == SEED_MODEL:
            return reasoning_judge(**self.task.asked)
        return reasoning_judge(self.adapter(name))

    def cell(self, name: str) -> dict[str, Any]:
        """Judge the held-out items by one row, and say all that is to be known of it."""
        row, start = self.task.rows[name], time.perf_counter()
        with self.open(row.judged_by or name) as judge:
            resume = self.folder / f"{_file_name(name)}.judged.jsonl"
            judged = list(judge.score_many(self.task.test, row.n_cot, self.random_seed, resume=resume))
        golds = [float(record.score or 0) for record in self.task.test]
        readings = {name: [read(one) for one in judged] for name, read in readers(self.random_seed).items()}
        figures = {name: evaluate(scores, golds) for name, scores in readings.items()}
        return {
            "row": name,
            "seed": self.random_seed,
            "machine": machine(),
            "date": date.today().isoformat(),
            "minutes": round((time.perf_counter() - start) / 60, 1),
            "learns from": row.learns_from,
            "settings": asdict(replace(self.task.settings, seed=self.random_seed, **row.settings)),
            "n_cot": row.n_cot,
            "trained on": 0 if row.judged_by else len(self.reasoned(row.learns_from, self.task.training)),
            "failed": sum(bool(one.error) for one in judged),
            "tokens": round(fmean(sum(map(len, one.feedback_ids)) for one in judged), 1),
            "truncated": sum(one.truncated for one in judged),
            "mass": round(fmean(one.mass for one in judged if not one.error), 4),
            "figures": {name: _rounded(values) for name, values in figures.items()},
            "best": self.task.best,
            # None for an item that could not be judged.
            "errors": [None if x != x else round(x - gold, 3) for x, gold in zip(readings["RAIL"], golds)],
        }


def readers(seed: int) -> dict[str, Callable[[Judgement], float]]:
    """How a score is read from a judgement: the expectation, the likeliest label, a sampled one."""
    draw = random.Random(seed)

    def sampled(one: Judgement) -> float:
        labels = list(one.values.values())
        return math.nan if one.error else draw.choices(labels, list(one.probabilities.values()))[0]

    return {"RAIL": lambda one: one.score, "most likely": lambda one: one.mode, "sampled": sampled}


def show_score(record: Record) -> Record:
    """The record as one asks why it got its score."""
    said = f"An expert gave it the score {record.score:g}. Say in one or two sentences why."
    rubric = record.rubric or Rubric("")
    return replace(record, rubric=replace(rubric, criteria=f"{rubric.criteria}\n{said}"))


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a cell, and the intervals over its items."""
    low_high = {name: [round(end, 4) for end in ends] for name, ends in values["intervals"].items()}
    return {name: round(values[name], 4) for name in FIGURES} | {"intervals": low_high}


def machine() -> str:
    """The processor and what counts for its figures."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} CPUs, torch {version('torch')}, transformers {version('transformers')}"


def _file_name(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() or letter == "." else " " for letter in name).split())


def measure(task: Task, seeds: Sequence[int], rows: Sequence[str], out: Path, cells: Path) -> None:
    """Fill the cells of these rows and seeds that are not there yet."""
    for seed in seeds:
        for name in rows:
            file = cells / task.name / f"{_file_name(name)}-seed{seed}.json"
            if file.exists():
                continue
            logger.info("%s, row %r, random seed %d", task.name, name, seed)
            folder = out / task.name / f"seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            cell = Grid(task, seed, folder).cell(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(cell) + "\n", encoding="utf-8")
            logger.info("%s: %s", file.name, {name: cell["figures"]["RAIL"][name] for name in FIGURES})


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a part of the example's grid, with few items")
    which.add_argument("--sts", metavar="FILE", help="pairs with human scores to train on, sts_test.jsonl beside it")
    which.add_argument("--vicuna", metavar="FILE", help="vicuna_eval.json of the Prometheus evaluation")
    which.add_argument("--page", action="store_true", help="write docs/evidence.md from the cells that are there")
    parser.add_argument("--seeds", type=int, nargs="+", help="random seeds")
    parser.add_argument("--rows", nargs="+", help="of the grid (all)")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="for adapters and reasonings")
    parser.add_argument("--cells", type=Path, default=CELLS, help="folder of the cells")
    options = parser.parse_args(arguments)
    if options.page:
        print(write_page(options.cells, options.cells.with_suffix(".md")))
        return
    name = "quick" if options.quick else "sts" if options.sts else "vicuna" if options.vicuna else "example"
    task = TASKS[name](options.sts or options.vicuna)
    for row in options.rows or ():
        if row not in task.rows:
            parser.error(f"no row {row!r}; there are: {', '.join(task.rows)}")
    measure(task, options.seeds or task.seeds, options.rows or list(task.rows), options.out, options.cells)


if __name__ == "__main__":
    main()
