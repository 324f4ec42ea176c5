"""Where things that are fetched or made once are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`TRACT_LITE_CACHE`, or `tract_lite` in the user's cache folder; made if it is not there."""
    of_user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tract_lite")
    folder = Path(os.environ.get("TRACT_LITE_CACHE") or of_user).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
