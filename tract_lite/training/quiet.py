"""How a run is told: a bar for each step, and nothing twice.

What is left out on the console: bars of the libraries below, and what a run says again later, or of
what only measures it.
"""

import logging
import sys
from contextlib import contextmanager
from typing import Any, Iterator

from tqdm.asyncio import tqdm_asyncio
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

# The parts of the package that tell of details: a run's log has them, its console their warnings.
DETAILS = tuple(
    f"tract_lite.{part}"
    for part in "engines export.parity export.reasoning_judge training.preflight training.seed_model "
    "training.trainer".split()
)
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
# In a file, a bar is shown after so many seconds, and as often.
SELDOM = 30.0


class _SeldomBar(tqdm):
    def display(self, *given: Any, **named: Any) -> None:
        """Nothing before the delay is over, also where a message stands above it."""
        if self._time() >= self.start_t + self.delay:
            super().display(*given, **named)


def progress(step: str, total: int | None = None, done: int = 0) -> tqdm:
    """A bar of a step, with the time left, which goes when the step is done; without a `total` its
    name alone. Where nobody looks at it, in a file, it is there for long steps alone."""
    in_notebook, console = tqdm is not tqdm_asyncio, sys.stderr
    how: dict[str, Any] = {"desc": step, "total": total, "initial": done, "disable": console is None}
    how |= {"leave": False, "dynamic_ncols": True, "bar_format": BAR if total else "{desc} ..."}
    if in_notebook or console is None or console.isatty():
        return tqdm(**how)
    return _SeldomBar(**how, mininterval=SELDOM, delay=SELDOM, ascii=True)


@contextmanager
def quiet_console() -> Iterator[None]:
    """What is logged inside stands above the bars of a console, which shows no `DETAILS`."""
    with logging_redirect_tqdm():
        # The console's handler is the last one here.
        logging.getLogger().handlers[-1].addFilter(_is_shown)
        yield


def _is_shown(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not f"{record.name}.".startswith(tuple(f"{name}." for name in DETAILS))


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' bars of the weights, which a folder's are read and written too fast
    for."""
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
    """Of what the loggers of a part say ("": of the whole package), only what is of this level or
    graver."""
    part = logging.getLogger(f"tract_lite.{name}".rstrip("."))
    before = part.level
    part.setLevel(level)
    try:
        yield
    finally:
        part.setLevel(before)
