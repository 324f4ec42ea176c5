"""Free space, and folders: for unfinished work that they don't outlive, and merged judges."""

from __future__ import annotations

import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Iterator

from tract_lite.spec import SPEC_FILE

GB = 10**9


@contextmanager
def work_folder(out: Path, size: int = 0, advice: str = "use another disk") -> Iterator[Path]:
    """A folder beside `out` for what is not finished; it goes afterwards, whatever happens.

    What a killed call for the same `out` has left is removed first. `size`: bytes to be written
    there; `advice`: what else helps where there is no room for them.

    Raises:
        RuntimeError: less than `size` is free.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for each call: a child of a killed one may still be writing.
    leftover = re.compile(rf"{re.escape(out.name)}\.\w+\.part")
    for path in out.parent.iterdir():
        if leftover.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    free = shutil.disk_usage(out.parent).free
    if size > free:
        raise RuntimeError(f"{out} takes {size / GB:.1f} GB of disk while it is made, and "
                           f"{out.parent.resolve()} has {free / GB:.1f} GB free: make room, choose "
                           f"another place, or {advice}")
    with TemporaryDirectory(prefix=f"{out.name}.", suffix=".part", dir=out.parent) as folder:
        yield Path(folder)


def is_merged_judge(folder: Path) -> bool:
    """Whether a folder is what merging writes, a model with the judge's spec, and nothing more.

    A GGUF file or a folder inside is somebody's work, which must not go with it.
    """
    own = all((folder / name).is_file() for name in ("config.json", SPEC_FILE))
    return own and not any(path.is_dir() or path.suffix == ".gguf" for path in folder.iterdir())
