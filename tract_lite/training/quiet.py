"""What is not said: bars of the libraries below, and lines that a run says again later."""

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
def warnings_alone() -> Iterator[None]:
    """Of what training tells of itself, only warnings."""
    training = logging.getLogger(__package__)
    level = training.level
    training.setLevel(logging.WARNING)
    try:
        yield
    finally:
        training.setLevel(level)
