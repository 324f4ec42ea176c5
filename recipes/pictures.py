"""Makes the README's pictures from a run: a judgement as `--explain` shows it, and its report.

    python recipes/pictures.py runs/mine --item train-81

The report is photographed by a Chromium without a window.
"""

import argparse
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Sequence

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tract_lite import Judge, errors_in_words, read_records, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
# Pixels of the report, from its top.
WIDTH, HEIGHT = 1200, 1330
# Characters of a judgement's line, and pixels of a character, a line and the border.
COLUMNS, ACROSS, DOWN, BORDER = 76, 8.5, 19, 22
FONT = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"


def draw_text(text: str) -> str:
    """A text as a terminal shows it, as an SVG picture."""
    lines = text.splitlines()
    width, height = round(COLUMNS * ACROSS) + 2 * BORDER, len(lines) * DOWN + 2 * BORDER
    rows = [
        f'<text x="{BORDER}" y="{BORDER + 14 + DOWN * number}" xml:space="preserve">{escape(line)}</text>'
        for number, line in enumerate(lines)
    ]
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    style = f'font-family="{FONT}" font-size="14" fill="#d8dee4"'
    paper = f'<rect width="{width}" height="{height}" rx="8" fill="#1c2128"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', paper, *rows, "</svg>", ""])


def find_browser() -> str:
    """The program that photographs a page. Raises ValueError: there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        raise ValueError("no Chromium is here to photograph the report\ninstall one: apt install chromium")
    return found


def photograph(browser: str, page: Path, picture: Path) -> None:
    """Write the upper part of a page as a PNG picture."""
    # The page is our own and loads nothing, so that it needs no sandbox, which root may not have.
    ways = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
    command = [browser, *ways, f"--screenshot={picture.resolve()}", page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True)


def make_pictures(run: Path, item: str | None, out: Path) -> None:
    """Write `judgement.svg`, of a held-out item or the first one, and `report.png`.
    Raises ValueError: no browser, no judge in the run, or no such item.
    """
    browser = find_browser()
    records = {record.id: record for record in read_records(run / "held_out.jsonl")}
    files = sorted(run.glob("judge-*.gguf"))
    if not files or item not in {None, *records}:
        raise ValueError(f"{run} has no judge-*.gguf, or no held-out item {item!r}\nname a finished run and its item")
    record = records[item] if item else next(iter(records.values()))
    out.mkdir(parents=True, exist_ok=True)
    with Judge.from_gguf(files[0]) as judge:
        (out / "judgement.svg").write_text(draw_text(judge.score(record).explain(record, COLUMNS)), encoding="utf-8")
    with TemporaryDirectory() as folder:
        photograph(browser, write_report(run, Path(folder) / "report.html"), out / "report.png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the README's pictures from a finished run.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--item", help="id of a held-out item")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="where they go")
    options = parser.parse_args(arguments)
    with errors_in_words():
        make_pictures(options.run, options.item, options.out)


if __name__ == "__main__":
    main()
