"""Flags that are the fields of a dataclass: one place for name, default, bound and help."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

import pytest

from tract_lite.options import JudgeOptions, add_flags, flag_of, option, options_from
from tract_lite.presets import RunOptions, StageOptions


@dataclass(frozen=True)
class Options:
    count: int = option(2, "how many", least=1)
    share: float | None = option(None, "how much", least=0.5, group="more")
    kind: str = option("a", "which", choices=("a", "b"))
    place: str | None = option(None, "where", metavar="FOLDER")
    names: tuple[str, ...] | None = option(None, "who", metavar="NAME")
    skip_bad: bool = option(False, "go on")


def parser_of(kind: type, groups: dict[str, str] | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tool")
    add_flags(parser, kind, groups)
    return parser


def read(*arguments: str) -> Options:
    return options_from(Options, parser_of(Options).parse_args(arguments))


@pytest.mark.parametrize("kind", [Options, JudgeOptions, StageOptions, RunOptions])
def test_without_a_flag_every_field_has_its_default(kind: type) -> None:
    assert options_from(kind, parser_of(kind).parse_args([])) == kind()


def test_every_field_can_be_chosen_by_its_flag() -> None:
    command = "--count 3 --share 0.75 --kind b --place here --names x y --skip-bad"
    assert read(*command.split()) == Options(3, 0.75, "b", "here", ("x", "y"), True)


def test_an_option_is_a_default_like_any_other() -> None:
    assert Options() == Options(2, None, "a", None, None, False)
    assert flag_of("skip_bad") == "--skip-bad"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--count", "0"), "--count must be at least 1, got 0"),
        (("--count", "-3"), "--count must be at least 1, got -3"),
        (("--share", "0.4"), "--share must be at least 0.5, got 0.4"),
        (("--share", "nan"), "--share must be at least 0.5, got nan"),
    ],
)
def test_a_number_that_is_too_small_is_refused_by_its_flag(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(*arguments)


def test_the_least_number_is_taken() -> None:
    assert read("--count", "1", "--share", "0.5") == Options(count=1, share=0.5)


@pytest.mark.parametrize("arguments", [("--count", "two"), ("--kind", "c"), ("--names",), ("--other", "1")])
def test_what_is_no_value_of_a_flag_ends_with_its_usage(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        read(*arguments)
    assert stopped.value.code == 2 and "usage: tool" in capsys.readouterr().err


def test_the_help_shows_what_a_flag_takes_and_its_default() -> None:
    lines = [" ".join(line.split()) for line in parser_of(Options, {"more": "more of it"}).format_help().splitlines()]
    assert "--count N how many (2)" in lines
    assert "--kind {a,b} which (a)" in lines
    assert "--place FOLDER where" in lines and "--skip-bad go on" in lines
    assert "--names NAME [NAME ...]" in lines and "who" in " ".join(lines)
    assert lines.index("more of it:") < lines.index("--share N how much")


@pytest.mark.parametrize("kind", [JudgeOptions, StageOptions, RunOptions])
def test_every_option_is_explained_and_has_a_flag_of_its_own(kind: type) -> None:
    text = " ".join(parser_of(kind, {"file": "a file", "server": "a server"}).format_help().split())
    for item in fields(kind):
        assert flag_of(item.name) in text and item.metadata["help"] in text


@pytest.mark.parametrize("name", ["parallel", "threads", "context_length", "timeout"])
def test_what_judging_counts_is_one_or_more(name: str) -> None:
    arguments = parser_of(JudgeOptions).parse_args([flag_of(name), "0"])
    with pytest.raises(ValueError, match=f"{flag_of(name)} must be at least 1, got 0"):
        options_from(JudgeOptions, arguments)
