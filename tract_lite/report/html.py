"""The page as one HTML file: tables, pictures and texts, with nothing loaded from outside."""

import hashlib
import io
import json
import math
import re
from base64 import b64encode
from importlib.resources import files
from typing import Any, Callable, Iterator, Mapping, NamedTuple

import matplotlib
from jinja2 import Environment
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from tract_lite.metrics import WITH_INTERVAL
from tract_lite.report import plots
from tract_lite.report.rows import judge_of, scores_alone
from tract_lite.report.words import duration
from tract_lite.version import __version__

# What stands in a picture, as the page's light and dark colours.
_COLOURS = {
    plots.INK: "var(--ink)",
    plots.FAINT: "var(--faint)",
    plots.ITEMS: "var(--items)",
    plots.COLOURS["stage1"]: "var(--stage1)",
    plots.COLOURS["stage2"]: "var(--stage2)",
}
# Of a long name, a table shows so many characters.
LONGEST_NAME = 160
UNDEFINED = "–"


class Cell(NamedTuple):
    """A cell of a table: its text, the number or name that it is sorted by, and what follows it."""

    text: str
    value: Any
    more: str = ""

    @property
    def is_number(self) -> bool:
        return not isinstance(self.value, str)


class Table(NamedTuple):
    """A table: its name in the page's JSON, its columns by their names there, and its rows."""

    name: str
    columns: Mapping[str, str]
    rows: list[list[Cell]]


def to_html(contents: Mapping[str, Any]) -> str:
    """The page of what `contents_of_run` or `contents_of_file` found.

    Its numbers also stand in it as JSON, in the element `figures`.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.globals |= {"number": number, "duration": duration, "as_json": _as_json, "with_options": _with_options}
    text = files("tract_lite.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    # The only script that a browser is to run.
    script = text.partition("<script>")[2].partition("</script>")[0]
    return environment.from_string(text).render(
        contents,
        version=__version__,
        data=Markup(_in_element(_as_json({name: value for name, value in contents.items() if name != "drawn"}))),
        tables={table.name: table for table in _tables(contents)},
        pictures=dict(_pictures(contents)),
        script_hash=b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
    )


def number(value: float | None) -> str:
    """A number as all tables show it: whole ones as they are, others with three decimals."""
    if value is None or math.isnan(value):
        return UNDEFINED
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _tables(contents: Mapping[str, Any]) -> Iterator[Table]:
    if rows := contents.get("rows"):
        scores = scores_alone(rows)
        yield _table_of_rows("rows", scores)
        if readings := {name: row for name, row in rows.items() if name not in scores}:
            yield _table_of_rows("readings", readings)
    shown: dict[str, dict[str, str]] = {
        "by_gold": {"from": "gold from", "to": "to", "count": "n", "score": "mean score", "mae": "mae", "rmse": "rmse"},
        "by_criteria": {"criteria": "criteria", "count": "n", "gold": "mean gold", "score": "mean score", "mae": "mae"},
        "by_std": {"from": "std from", "to": "to", "count": "n", "mae": "mae", "rmse": "rmse"},
        "calibration": {
            **{"from": "probability from", "to": "to", "count": "labels"},
            **{"predicted": "on average", "observed": "right"},
        },
    }
    for name, columns in shown.items():
        if rows := contents.get(name):
            yield Table(name, columns, [[_cell(row[column]) for column in columns] for row in rows])


def _table_of_rows(table_name: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """The figures of each judge, with their intervals, and the gain over each baseline."""
    baselines = list(dict.fromkeys(name for row in rows.values() for name in row.get("better_by", {})))
    figures = {"mae": "MAE", "rmse": "RMSE", "pearson": "Pearson", "spearman": "Spearman", "kendall": "Kendall"}
    gains = {f"better_by {name}": f"RMSE lower than “{judge_of(name)}” by" for name in baselines}
    columns = {"name": "judge", "count": "n", **figures, **gains, "coverage": "judged"}
    table = []
    for name, row in rows.items():
        cells = [_cell(name), _cell(row["count"])]
        for column in figures:
            cells.append(_cell(row[column], _interval(row, column) if column in WITH_INTERVAL else ""))
        for baseline in baselines:
            gained = row.get("better_by", {}).get(baseline)
            cells.append(_cell(gained["rmse"], _interval(gained, "rmse")) if gained else Cell("", None))
        table.append([*cells, _cell(row["coverage"])])
    return Table(table_name, columns, table)


def _cell(value: Any, more: str = "") -> Cell:
    if isinstance(value, str):
        return Cell(value if len(value) <= LONGEST_NAME else f"{value[:LONGEST_NAME]} …", value)
    is_known = value is not None and math.isfinite(value)
    return Cell(number(value), value if is_known else None, more if is_known else "")


def _interval(row: Mapping[str, Any], name: str) -> str:
    ends = row.get("intervals", {}).get(name)
    return f"{number(ends[0])} to {number(ends[1])}" if ends and all(map(math.isfinite, ends)) else ""


def _pictures(contents: Mapping[str, Any]) -> Iterator[tuple[str, Markup]]:
    drawn = contents.get("drawn", {})

    def picture(name: str, alt: str, draw: Callable[..., None], *given: Any) -> tuple[str, Markup]:
        figure = plots.new_figure(4.4, 3.6)
        draw(figure.add_subplot(), *given)
        return name, to_svg(figure, name, alt)

    if len(drawn.get("golds", ())):
        yield picture("scores", "predicted against gold", plots.draw_scores, drawn["golds"], drawn["scores"])
    for name, alt, draw in (
        ("calibration", "how often labels of a probability were right", plots.draw_calibration),
        ("by_std", "error by the judge's std", plots.draw_doubt),
        ("by_gold", "error by gold score", plots.draw_errors),
    ):
        if rows := contents.get(name):
            yield picture(name, alt, draw, rows)
    if each := drawn.get("lengths"):
        yield picture("lengths", "length of the reasonings", plots.draw_lengths, each, contents["lengths"]["unit"])
    if logs := drawn.get("curves"):
        for term, title in plots.TERMS.items():
            yield picture(term, f"{title}, by the step", plots.draw_term, term, logs)


def to_svg(figure: Figure, name: str, alt: str) -> Markup:
    """A picture to stand in a page, in the page's colours, on its ground, its texts as paths.

    All ids begin with `name`, so that those of several pictures differ.
    """
    figure.patch.set_visible(False)
    for ax in figure.axes:
        ax.patch.set_visible(False)
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name, "savefig.dpi": 150}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text).replace("url(#", f"url(#{name}-")
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text).replace("xlink:href=", "href=")
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, variable)
    width, height = (72 * inches for inches in figure.get_size_inches())
    opening = f'<svg class="picture" role="img" aria-label="{alt}" viewBox="0 0 {width:g} {height:g}"'
    return Markup(re.sub(r"<svg[^>]*>", f'{opening} style="max-width: {width * 1.25:g}px">', text, count=1).strip())


def _with_options(text: str) -> Markup:
    """A text with the options that it names, such as --epochs, on one line each."""
    return Markup(re.sub(r"--[a-z][a-z-]*", r"<code>\g<0></code>", str(escape(text))))


def _as_json(value: Any) -> str:
    """A text as it is, anything else as JSON; None where a number is none."""
    return value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _in_element(text: str) -> str:
    """JSON that can stand inside an element of a page."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(_plain, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value
