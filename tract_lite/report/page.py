"""The report of a run or of a file of judgements: `report.html` to look at, the rest in short."""

import json
from pathlib import Path
from typing import Any, Mapping

import numpy as np

from tract_lite.data.jsonl import replacing
from tract_lite.report import plots
from tract_lite.report.contents import contents_of_file, contents_of_run
from tract_lite.report.html import to_html
from tract_lite.report.rows import short_table
from tract_lite.run import FIGURE, PAGE, REPORT, Run


def write_report(path: str | Path, output: str | Path | None = None, data: str | None = None) -> Path:
    """Write the page of a run folder, or of a file of judgements with gold scores (JSONL, or a
    table), and return where it is.

    A folder gets `report.html` with `report.md` and `report.png`, the same in short; parts that are
    missing in it are left out. The page of `scores.csv` is `scores.report.html` beside it. With
    `output` the page alone is written, there. `data`: the file that was judged, for the texts.
    Raises ValueError: there is nothing to report, or `data` is given for a folder.
    Raises FileNotFoundError: no such file.
    """
    path = Path(path)
    if path.is_file():
        return _write(to_html(contents_of_file(path, data)), Path(output or path.with_suffix(f".{PAGE}")))
    if path.suffix and not path.exists():
        raise FileNotFoundError(f"no file {path}")
    if data is not None:
        raise ValueError(f"{path} is a run folder, which has its own data\nleave --data out")
    contents = contents_of_run(Run(path))
    return _write(to_html(contents), Path(output)) if output else write_pages(contents, Run(path))


def write_pages(contents: Mapping[str, Any], run: Run) -> Path:
    """Write what `contents_of_run` found as the three files of a run's report."""
    drawn = contents["drawn"]
    golds = drawn.get("golds", np.empty(0))
    has_figure = bool(drawn["curves"]) or golds.size > 0
    if has_figure:
        plots.draw_page(drawn["curves"], golds, drawn.get("scores", golds)).savefig(run / FIGURE, dpi=150)
    _write(_in_short(contents, has_figure), run / REPORT)
    return _write(to_html(contents), run / PAGE)


def _in_short(contents: Mapping[str, Any], has_figure: bool) -> str:
    """The report as a short text in markdown."""
    parts = [f"# {contents['title']}", contents["verdict"]]
    if rows := contents["rows"]:
        table, _, below = short_table(rows).partition("\n\n")
        parts += [table, below]
    parts += [f"{note[0].upper()}{note[1:]}." for note in contents["notes"]]
    if has_figure:
        parts.append(f"![losses, and scores against gold]({FIGURE})")
    if counts := contents["counts"]:
        lines = [f"- {name}: {n if isinstance(n, str) else json.dumps(n)}" for name, n in counts.items()]
        parts += ["## Counts", "\n".join(lines)]
    parts.append(f"Pictures, examples and settings are in [{PAGE}]({PAGE}).")
    return "\n\n".join(filter(None, parts)) + "\n"


def _write(text: str, path: Path) -> Path:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path
