"""Builds the notebooks for Colab and Kaggle from their one source, `notebook.md`.

python recipes/notebooks.py
"""

import re
from pathlib import Path
from typing import Any

import nbformat.v4 as nb
from jinja2 import Environment, StrictUndefined

FOLDER = Path(__file__).resolve().parent
# Where the notebooks, their clone and the badges in the README point to.
REPOSITORY = "tract-lite/tract-lite"
COLAB, KAGGLE = "https://colab.research.google.com", "https://kaggle.com"
PLATFORMS: dict[str, dict[str, Any]] = {
    "colab": {
        "platform": "Colab",
        "gpu_menu": "*Runtime*, *Change runtime type*, *T4 GPU*",
        "upload": " (upload it with the folder symbol on the left and write `/content/NAME.csv`, "
        "or give its path on Drive)",
        "kept": "/content/drive/MyDrive",
        "kept_words": " on Drive, which survives the session",
        "image": f"{COLAB}/assets/colab-badge.svg",
        "opens": f"{COLAB}/github/",
        "metadata": {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}},
    },
    "kaggle": {
        "platform": "Kaggle",
        "gpu_menu": "*Settings*, *Accelerator*, *GPU T4 x2*",
        "upload": " (*Add input*, then its path under `/kaggle/input`)",
        "kept": "/kaggle/working",
        "kept_words": " in `/kaggle/working`",
        "image": f"{KAGGLE}/static/images/open-in-kaggle.svg",
        "opens": f"{KAGGLE}/kernels/welcome?src=https://github.com/",
        "metadata": {"kaggle": {"accelerator": "nvidiaTeslaT4", "isGpuEnabled": True, "isInternetEnabled": True}},
    },
}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook_file(platform: str) -> Path:
    """Where a platform's notebook stands."""
    return FOLDER / f"tract_lite_{platform}.ipynb"


def badge(platform: str) -> str:
    """The badge that opens a platform's notebook, as Markdown."""
    its = PLATFORMS[platform]
    link = f"{its['opens']}{REPOSITORY}/blob/main/recipes/{notebook_file(platform).name}"
    return f"[![Open in {its['platform']}]({its['image']})]({link})"


def build(platform: str) -> str:
    """The text of a platform's notebook: fenced Python is a code cell, what is between a text."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((FOLDER / "notebook.md").read_text(encoding="utf-8"))
    choice = {name: name == platform for name in PLATFORMS}
    text = template.render(PLATFORMS[platform], repository=REPOSITORY, **choice)
    parts = re.split(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    # Odd parts stood in a fence.
    makers = (nb.new_markdown_cell, nb.new_code_cell)
    cells = [makers[n % 2](part.strip("\n"), id=f"cell-{n}") for n, part in enumerate(parts) if part.strip()]
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}, **PLATFORMS[platform]["metadata"]}
    notebook = nb.new_notebook(cells=cells, metadata=metadata, nbformat_minor=5)
    return nb.writes(notebook) + "\n"


def main() -> None:
    for platform in PLATFORMS:
        notebook_file(platform).write_text(build(platform), encoding="utf-8")
        print(notebook_file(platform))


if __name__ == "__main__":
    main()
