"""The pictures of the README: a terminal's text as SVG, and a page that a browser photographs."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pictures
import pytest


def test_every_line_of_a_text_is_drawn_as_it_stands() -> None:
    lines = ["Response", "  A & B <i>", "", "  3 0.464 ██▎", "score 2.66   std 0.70"]
    svg = ElementTree.fromstring(pictures.draw_text("\n".join(lines)))
    drawn = [element for element in svg if element.tag.endswith("text")]
    assert [element.text or "" for element in drawn] == lines
    heights = [float(element.attrib["y"]) for element in drawn]
    assert heights == sorted(set(heights)) and heights[-1] < float(svg.attrib["height"])


def test_without_a_browser_two_lines_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        pictures.main([str(tmp_path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(said) == 2
    assert "no Chromium" in said[0] and "install" in said[1]
    assert not (tmp_path / "out").exists()
