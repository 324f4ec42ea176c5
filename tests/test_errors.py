"""What goes wrong is told in words, with a code, and never with a traceback."""

from __future__ import annotations

import errno
import io
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable

import jinja2
import pytest
import torch
from safetensors.torch import load_file

from tract_lite import errors_in_words, read_records
from tract_lite.errors import told


def caught(call: Callable[..., Any], *arguments: Any) -> BaseException:
    try:
        call(*arguments)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def damaged_weights() -> None:
    Path("a.safetensors").write_bytes(b"x" * 99)
    load_file("a.safetensors")


def bad_rows() -> None:
    Path("a.csv").write_text("response,score\n" + "".join(f"a,x{n}\n" for n in range(9)))
    read_records("a.csv")


@pytest.mark.parametrize(
    "cause, code, words",
    [
        (ValueError("a is too long\n  b too"), 2, "a is too long\n  b too"),
        (lambda: open("none.txt"), 2, "[Errno 2] No such file or directory: 'none.txt'"),
        (
            lambda: __import__("no_such_module.inside"),
            2,
            "No module named 'no_such_module': pip install no_such_module",
        ),
        (ModuleNotFoundError("No", name="llama_cpp.x"), 2, "No: pip install llama-cpp-python"),
        (
            lambda: version("no-such-package"),
            2,
            "No package metadata was found for no-such-package: pip install no-such-package",
        ),
        (ImportError("this needs sentencepiece"), 2, "this needs sentencepiece"),
        (lambda: jinja2.Template("a\n{% if %}"), 2, "the prompt's template, line 2: Expected an expression"),
        (lambda: jinja2.Template("{{ a.b.c }}").render(), 2, "the prompt's template: 'a' is undefined"),
        (damaged_weights, 2, "a file of weights is damaged (Error while deserializing header"),
        (bad_rows, 2, "a.csv: unusable rows: 9"),
        (lambda: torch.zeros(2) + torch.zeros(3), 1, "The size of tensor a (2) must match"),
        (OSError(errno.EIO, "Input/output error"), 1, "[Errno 5] Input/output error"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "[Errno 28] No space left on device: the disk is full;"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), 1, "[enforce fail at"),
        (lambda: bytearray(2**62), 1, "this machine's memory is too small"),
        (RuntimeError(), 1, "RuntimeError"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on"),
    ],
)
def test_an_error_is_told_with_its_code(
    cause: Any, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = cause if isinstance(cause, BaseException) else caught(cause)
    failure = told(error)
    assert failure and failure.code == code
    assert "\n".join(failure.lines).startswith(words)
    assert len(failure.lines) <= 2


@pytest.mark.parametrize("error", [TypeError("f() takes 1"), KeyError("a"), AssertionError(), ZeroDivisionError()])
def test_a_fault_of_the_program_keeps_its_traceback(error: Exception) -> None:
    assert told(error) is None
    with pytest.raises(type(error)), errors_in_words():
        raise error


def test_a_process_ends_with_the_code_and_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, errors_in_words():
        raise ValueError("made with other settings:\n  epochs: 1 there, 2 now")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: made with other settings:\n  epochs: 1 there, 2 now\n"
    with pytest.raises(SystemExit) as ended, errors_in_words():
        raise SystemExit(7)
    assert ended.value.code == 7 and capsys.readouterr().err == ""


def test_what_standard_output_has_no_letters_for_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    with errors_in_words():
        print("runs/Öfen", flush=True)
    assert shown.getvalue() == b"runs/?fen\n"
