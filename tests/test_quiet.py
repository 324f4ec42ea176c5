"""How a run is told: bars that go when their step is done, and nothing in a file of a short one."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from tract_lite.training import quiet
from tract_lite.training.quiet import progress, quiet_console


class Console(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def console(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> Console:
    """What takes the place of standard error, for one test."""
    shown = Console(is_terminal)
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def test_a_bar_tells_the_time_left_and_goes_when_its_step_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = console(monkeypatch, True)
    with progress("judging", 4, 1) as bar:
        bar.set_postfix_str("off by 0.50")
        bar.update()
        bar.refresh()
    shown = terminal.getvalue().split("\r")
    assert any("judging:  50%" in line and "2/4" in line and " left, off by 0.50" in line for line in shown)
    assert not shown[-2].strip() and not shown[-1] and "\n" not in terminal.getvalue()


def test_a_step_of_unknown_length_shows_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = console(monkeypatch, True)
    with progress("converting"):
        assert terminal.getvalue().split("\r")[-1].strip() == "converting ..."
    assert not terminal.getvalue().split("\r")[-1]


def test_in_a_file_a_short_step_has_no_bar_and_messages_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    file = console(monkeypatch, False)
    logger = logging.getLogger("somewhere")
    with quiet_console(), progress("judging", 3) as bar:
        for number in range(3):
            bar.update()
            logger.warning("item %d", number)
    assert [line.strip() for line in file.getvalue().replace("\r", "\n").splitlines() if line.strip()] == [
        "item 0",
        "item 1",
        "item 2",
    ]


def test_in_a_file_a_long_step_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    file = console(monkeypatch, False)
    monkeypatch.setattr(quiet, "SELDOM", 1e-9)
    with progress("judging", 2) as bar:
        bar.update()
        assert "judging:  50%|" in file.getvalue() and "█" not in file.getvalue()


def test_without_any_standard_error_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress("judging", 2) as bar:
        bar.update()
    assert bar.disable
