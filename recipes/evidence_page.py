"""docs/evidence.md, made from the cells alone: a table and plots for each task."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Iterator, Mapping, Sequence

import numpy as np
from evidence_tasks import EXAMPLE_ROWS, RAFT, STAGE_1, STS_ROWS, TRACT, VICUNA_ROWS, Row
from matplotlib.figure import Figure
from scipy.stats import t as student

Cell = dict[str, Any]
# The cells of a task: by row and random seed.
Cells = dict[str, dict[int, Cell]]

RESAMPLES = 2000


@dataclass(frozen=True)
class Section:
    """A task on the page; its rows are compared with the one named `base`."""

    title: str
    rows: Mapping[str, Row]
    said: str
    base: str = TRACT


SECTIONS = {
    "example": Section(
        "The example, whose optimum is known",
        EXAMPLE_ROWS,
        "Advice in four tips, 2,500 training items and 1,000 test items (`recipes/example.py`), a toy seed model. The "
        "distribution of each gold score is known, so the best possible RMSE is too.",
    ),
    "sts": Section(
        "Human scores, and no reasonings",
        STS_ROWS,
        "Pairs of image captions with human similarity scores from 0 to 5: the rows of the STS Benchmark (Cer et al., "
        "2017, at ixa2.si.ehu.eus/stswiki) whose source is `images`, each as an item with the response `A: ...`, "
        "`B: ...` on two lines. 600 training pairs, 500 test pairs, SmolLM2-135M-Instruct; annotators wrote no "
        "reasonings, the seed model writes some of at most 60 tokens in their place.",
        RAFT,
    ),
    "vicuna": Section(
        "GPT-4's reasonings and scores",
        VICUNA_ROWS,
        "Vicuna Bench with three judgements of GPT-4 for each of 320 answers (prometheus-eval publishes it as "
        "`vicuna_eval.json`), split by instruction; SmolLM2-135M-Instruct.",
    ),
}
# Against TRACT, the paper has these rows behind (its tables 2 and 4).
WORSE_IN_PAPER = (
    "CE, no reasoning",
    "CE, annotators' reasonings",
    "CE, own reasonings",
    RAFT,
    STAGE_1,
    "stage 2 from stage 1",
    "mixed reasonings",
    "raft_weight 0.1",
)
# At 1, both are TRACT's own row.
PLOTTED = ("raft_weight", "n_cot")


def write_page(cells: Path, out: Path) -> Path:
    """Write the page of all cells, and its plots beside them."""
    lines = [
        "# Evidence",
        "",
        "Made by `python recipes/evidence.py --page` from the cells in [docs/evidence](evidence): each is one row of a "
        "grid with one random seed, its machine, settings and time. Figures are means over the random seeds with 95 % "
        "intervals (Student's t); of one seed, the interval is that over the test items (bootstrap). Differences are "
        "paired, by the random seeds measured on one machine, or by test items where there is one seed; a positive one "
        "means a higher RMSE, so a worse judge.",
    ]
    for name, section in SECTIONS.items():
        found = load(cells / name, section.rows)
        lines += ["", f"## {section.title}", ""]
        if not any(found.values()):
            lines += [f"{section.said} Not measured yet."]
        else:
            lines += [section.said, "", *_table(found, section)]
            lines += ["", *_readings(found), *_machines(found)]
            lines += _does_reasoning_help(found) if section.base == RAFT else _against_paper(found)
            lines += _plots(found, cells / name)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def load(folder: Path, rows: Mapping[str, Row]) -> Cells:
    """The cells of a task's rows, by random seed."""
    found: Cells = {row: {} for row in rows}
    for file in sorted(folder.glob("*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        if cell["row"] in found:
            found[cell["row"]][cell["seed"]] = cell
    return found


def over_seeds(cells: Mapping[int, Cell], figure: str, reading: str = "RAIL") -> tuple[float, float, float]:
    """The mean of a figure over the random seeds, and the ends of its 95 % interval."""
    values = [cell["figures"][reading][figure] for cell in cells.values()]
    if len(values) == 1:
        [cell] = cells.values()
        return (values[0], *cell["figures"][reading]["intervals"][figure])
    return _t_interval(values)


def higher_by(cells: Mapping[int, Cell], others: Mapping[int, Cell]) -> tuple[float, float, float] | None:
    """How much higher the RMSE is than the others', in pairs; None where nothing can be paired."""
    pairs = [
        (cell, others[seed])
        for seed, cell in cells.items()
        if seed in others and cell["machine"] == others[seed]["machine"]
    ]
    if not pairs:
        return None
    if len(pairs) > 1:
        return _t_interval([_rmse(one) - _rmse(other) for one, other in pairs])
    a, b = np.square(np.array([cell["errors"] for cell in pairs[0]], dtype=float))
    judged = np.isfinite(a + b)
    a, b = a[judged], b[judged]
    items = np.random.default_rng(0).integers(a.size, size=(RESAMPLES, a.size))
    draws = np.sqrt(a[items].mean(axis=1)) - np.sqrt(b[items].mean(axis=1))
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(np.sqrt(a.mean()) - np.sqrt(b.mean())), float(low), float(high)


def _rmse(cell: Cell) -> float:
    return cell["figures"]["RAIL"]["rmse"]


def _t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    mean = fmean(values)
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _shown(figure: tuple[float, float, float] | None, sign: str = "") -> str:
    return "" if figure is None else "{:{s}.3f} [{:{s}.3f}, {:{s}.3f}]".format(*figure, s=sign)


def _table(found: Cells, section: Section) -> Iterator[str]:
    best = next((cell["best"] for cells in found.values() for cell in cells.values()), None)
    over = " of the best |" if best else ""
    yield f"| judge | learns from | items | seeds | Pearson | RMSE |{over} RMSE minus that of {section.base} | tokens |"
    yield f"| --- | --- | ---: | ---: | ---: | ---: |{' ---: |' if best else ''} ---: | ---: |"
    for name, row in section.rows.items():
        cells, source = found[name], row.learns_from or ("" if row.judged_by else "scores alone")
        if not cells:
            yield f"| {name} | {source} | | not run | | |{' |' if best else ''} | |"
            continue
        rmse = over_seeds(cells, "rmse")
        times = f" {rmse[0] / best:.3f} |" if best else ""
        minus = "" if name == section.base else _shown(higher_by(cells, found[section.base]), "+")
        tokens = fmean(cell["tokens"] for cell in cells.values())
        shown = f"{_shown(over_seeds(cells, 'pearson'))} | {_shown(rmse)} |{times} {minus} | {tokens:.0f}"
        items = fmean(cell["trained on"] for cell in cells.values())
        yield f"| {name} | {source} | {items:,.0f} | {len(cells)} | {shown} |"
    if best:
        yield ""
        yield f"The best possible RMSE on these items is {best:.3f}."


def _readings(found: Cells) -> Iterator[str]:
    """What the three ways of reading a score give, for the judges of both stages."""
    stages = [name for name in (RAFT, STAGE_1, TRACT) if found.get(name)]
    if not stages:
        return
    yield "RMSE by how the score is read:"
    yield ""
    yield "| judge | sampled label | most likely label | RAIL |"
    yield "| --- | ---: | ---: | ---: |"
    for name in stages:
        read = (_shown(over_seeds(found[name], "rmse", reading)) for reading in ("sampled", "most likely", "RAIL"))
        yield f"| {name} | {' | '.join(read)} |"
    yield ""


def _machines(found: Cells) -> Iterator[str]:
    cells = [cell for row in found.values() for cell in row.values()]
    minutes = sum(cell["minutes"] for cell in cells)
    machines = "; ".join(sorted({cell["machine"] for cell in cells}))
    yield f"{len(cells)} cells, {minutes:.0f} minutes in all, on: {machines}."


def _does_reasoning_help(found: Cells) -> Iterator[str]:
    """Whether the best judge that reasons is better than the one that answers directly."""
    reasoned = [name for name, cells in found.items() if cells and name != RAFT and STS_ROWS[name].learns_from]
    if not (found[RAFT] and reasoned):
        return
    best = min(reasoned, key=lambda name: over_seeds(found[name], "rmse")[0])
    if difference := higher_by(found[best], found[RAFT]):
        _, low, high = difference
        unsure = "neither surely helps nor surely hurts"
        verdict = "makes it worse" if low > 0 else "helps" if high < 0 else unsure
        yield ""
        yield (
            f"Does reasoning help a seed model of 135 M weights here? The best judge that reasons ({best}) has an RMSE "
            f"higher by {_shown(difference, '+')} than {RAFT}: reasoning {verdict}."
        )


def _against_paper(found: Cells) -> Iterator[str]:
    """Of the rows that the paper has behind TRACT: which are, here?"""
    groups: dict[str, list[str]] = {"agree": [], "are not sure": [], "disagree": []}
    for name in WORSE_IN_PAPER:
        if difference := higher_by(found[name], found[TRACT]):
            _, low, high = difference
            groups["agree" if low > 0 else "disagree" if high < 0 else "are not sure"].append(name)
    told = [f"{', '.join(names)} {verdict}" for verdict, names in groups.items() if names]
    if told:
        yield ""
        yield f"The paper has these rows behind TRACT; here, by the paired intervals: {'; '.join(told)}."


def _plots(found: Cells, folder: Path) -> Iterator[str]:
    """The curve of each setting that was changed, from its rows and TRACT's."""
    for setting in PLOTTED:
        points = {1.0: found[TRACT]} if found.get(TRACT) else {}
        for name, cells in found.items():
            head, _, value = name.rpartition(f"{setting} ")
            if cells and value.replace(".", "", 1).isdigit() and head in ("", f"{TRACT}, "):
                points[float(value)] = cells
        if len(points) > 1:
            path = folder / f"{setting}.svg"
            _draw(setting, points, path)
            yield ""
            yield f"![RMSE by {setting}](evidence/{folder.name}/{path.name})"


def _draw(setting: str, points: Mapping[float, Mapping[int, Cell]], path: Path) -> None:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    places = sorted(points)
    means, lows, highs = zip(*(over_seeds(points[place], "rmse") for place in places))
    axes.errorbar(places, means, [np.subtract(means, lows), np.subtract(highs, means)], marker="o", capsize=3)
    if best := next(iter(points[places[0]].values()))["best"]:
        axes.axhline(best, color="grey", linestyle=":", label="best possible")
        axes.legend()
    axes.set(xscale="log", xticks=places, xticklabels=[f"{place:g}" for place in places], xlabel=setting, ylabel="RMSE")
    axes.minorticks_off()
    # Without a date, so that the same cells give the same file.
    figure.savefig(path, metadata={"Date": None})
