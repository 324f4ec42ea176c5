"""What is not said: bars of the libraries below, and what a run says again later, or of what only
measures it."""

import logging
from contextlib import contextmanager
from typing import Iterator


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' bar of the weights, which a folder's are loaded too fast for."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextmanager
def quieter(name: str, level: int) -> Iterator[None]:
    """Of what the loggers of a package's part say, only what is of this level or graver."""
    part = logging.getLogger(f"tract_lite.{name}")
    before = part.level
    part.setLevel(level)
    try:
        yield
    finally:
        part.setLevel(before)
