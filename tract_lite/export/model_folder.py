"""Folders of models: of seed models, of merged judges, and of work that is not finished."""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Iterator

from safetensors import safe_open

from tract_lite.data.jsonl import read_json
from tract_lite.data.places import why_not_loaded
from tract_lite.spec import SPEC_FILE

GB = 10**9
NOT_COPIED = (".safetensors", ".bin", ".gguf", ".index.json", ".pt", ".pth", ".h5", ".msgpack")


@contextmanager
def work_folder(out: Path, size: int = 0, advice: str = "use another disk") -> Iterator[Path]:
    """A folder beside `out` for what is not finished; it goes afterwards, whatever happens.

    What a killed call for the same `out` has left is removed first. Raises RuntimeError: less than
    `size` bytes are free; `advice` says what else helps.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for each call: a child of a killed one may still be writing.
    leftover = re.compile(rf"{re.escape(out.name)}\.\w+\.part")
    for path in out.parent.iterdir():
        if leftover.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    free = shutil.disk_usage(out.parent).free
    if size > free:
        disk, need, left = out.parent.resolve(), f"{size / GB:.1f}", f"{free / GB:.1f}"
        hint = f"make room, choose another place, or {advice}"
        raise RuntimeError(f"{out} takes {need} GB of disk while it is made, and {disk} has {left} GB free: {hint}")
    with TemporaryDirectory(prefix=f"{out.name}.", suffix=".part", dir=out.parent) as folder:
        yield Path(folder)


def is_merged_judge(folder: Path) -> bool:
    """Whether a folder is what merging writes, a model with the judge's spec, and nothing more."""
    # A GGUF file or a folder inside is somebody's work, which must not go with it.
    own = all((folder / name).is_file() for name in ("config.json", SPEC_FILE))
    return own and not any(path.is_dir() or path.suffix == ".gguf" for path in folder.iterdir())


def seed_folder(seed_model: str | Path, *, weights: bool = True, download: bool = True) -> Path:
    """The folder of a seed model; of a hub id, the one in the hub's cache, perhaps without weights.
    Raises FileNotFoundError: no such folder, or the hub does not give it.
    """
    if Path(seed_model).is_dir():
        return Path(seed_model)
    from huggingface_hub import snapshot_download

    unused = ["*.bin", "*.gguf", "*.pth", "consolidated*", "original/*", *["*.safetensors"] * (not weights)]
    try:
        return Path(snapshot_download(str(seed_model), ignore_patterns=unused, local_files_only=not download))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(why_not_loaded(seed_model, error)) from error


def plain_name(name: str) -> str:
    """A weight's name without the parts that multimodal wrappers put around their text model."""
    return name.replace("language_model.", "")


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor in a model folder. Raises ValueError: no safetensors files."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in read_json(index)["weight_map"].items()}
    # Some models bring a second set of weights under other names.
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        advice = "load the model with transformers and save it into its folder"
        raise ValueError(f"{folder} holds no safetensors files\n{advice}")
    where = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            where.update(dict.fromkeys(opened.keys(), file))
    return where


def copy_other_files(seed_dir: Path, out_dir: Path, untied: bool = False) -> None:
    """Copy a seed model's files but its weights; the config as of 16 bits, and `untied` if so."""
    for file in seed_dir.iterdir():
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            shutil.copyfile(file, out_dir / file.name)
    path = out_dir / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if untied:
        config["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
