"""Builds the notebooks for Colab and Kaggle from their one source, `notebook.md`.

python recipes/notebooks.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "notebook.md"
# Where the notebooks, their clone and the badges in the README point to.
REPOSITORY = "tract-lite/tract-lite"
BLOB = f"{REPOSITORY}/blob/main/recipes"

PLATFORMS: dict[str, dict[str, str]] = {
    "colab": {
        "platform": "Colab",
        "gpu_menu": "*Runtime*, *Change runtime type*, *T4 GPU*",
        "upload": " (upload it with the folder symbol on the left and write `/content/NAME.csv`, "
        "or give its path on Drive)",
        "kept": "/content/drive/MyDrive",
        "kept_words": " on Drive, which survives the session",
    },
    "kaggle": {
        "platform": "Kaggle",
        "gpu_menu": "*Settings*, *Accelerator*, *GPU T4 x2*",
        "upload": " (*Add input*, then its path under `/kaggle/input`)",
        "kept": "/kaggle/working",
        "kept_words": " in `/kaggle/working`",
    },
}

METADATA: dict[str, dict[str, Any]] = {
    "colab": {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}},
    "kaggle": {"kaggle": {"accelerator": "nvidiaTeslaT4", "isGpuEnabled": True, "isInternetEnabled": True}},
}


def notebook_file(platform: str) -> Path:
    """Where a platform's notebook stands."""
    return FOLDER / f"tract_lite_{platform}.ipynb"


def badge(platform: str) -> str:
    """The badge that opens a platform's notebook, as Markdown."""
    name = notebook_file(platform).name
    if platform == "colab":
        link = f"https://colab.research.google.com/github/{BLOB}/{name}"
        image = "https://colab.research.google.com/assets/colab-badge.svg"
    else:
        link = f"https://kaggle.com/kernels/welcome?src=https://github.com/{BLOB}/{name}"
        image = "https://kaggle.com/static/images/open-in-kaggle.svg"
    return f"[![Open in {PLATFORMS[platform]['platform']}]({image})]({link})"


def build(platform: str) -> str:
    """The text of a platform's notebook: fenced Python is a code cell, what is between a text."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    choice = {name: name == platform for name in PLATFORMS}
    text = environment.from_string(SOURCE.read_text(encoding="utf-8")).render(
        PLATFORMS[platform], repository=REPOSITORY, **choice
    )
    parts = re.split(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    cells = [_cell(number, part.strip("\n")) for number, part in enumerate(parts) if part.strip()]
    kernel = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook = {"cells": cells, "metadata": kernel | METADATA[platform], "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _cell(number: int, source: str) -> dict[str, Any]:
    """Odd parts stood in a fence."""
    cell: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}, "source": source.splitlines(keepends=True)}
    if number % 2:
        return cell | {"cell_type": "code", "execution_count": None, "outputs": []}
    return cell | {"cell_type": "markdown"}


def main() -> None:
    for platform in PLATFORMS:
        notebook_file(platform).write_text(build(platform), encoding="utf-8")
        print(notebook_file(platform))


if __name__ == "__main__":
    main()
