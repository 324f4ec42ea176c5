"""What a name stands for: a file or a model's folder, wherever it lies, or an id of the hub."""

import hashlib
import re
from pathlib import Path

from tract_lite.data.files import fingerprint
from tract_lite.data.hub import is_hub_id, why_not_fetched

# What makes a model's folder the one that it is; transformers adds other files at times.
MODEL_FILES = re.compile(r"config\.json|tokenizer.*|chat_template.*|.*\.(safetensors|bin)")
NO_PLACE = "no folder {}, and no id of the hub looks like that"


def content_of(name: str | Path) -> str | None:
    """A hash of what a file or a model's folder holds, or None for any other name.

    A file is read as a whole, of weights only pieces: another model differs in most of them.
    """
    path = Path(name)
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for inside in sorted(path.iterdir()):
        if MODEL_FILES.fullmatch(inside.name) and inside.is_file():
            digest.update(f"{inside.name} {fingerprint(inside)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def check_model(name: str | Path) -> None:
    """Raises FileNotFoundError: no folder has this name, and no id of the hub can have it.
    Raises ValueError: it is a file, or a folder without a model's config.
    """
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name} is a file: name the folder of a model in safetensors, or its id on the hub")
    if path.is_dir() and not (path / "config.json").is_file():
        inside = next((file.parent for file in sorted(path.glob("*/config.json"))), None)
        hint = f"; {inside} has one" if inside else ""
        raise ValueError(f"{name} is not the folder of a model: it has no config.json{hint}")
    if not path.is_dir() and not is_hub_id(str(name)):
        raise FileNotFoundError(NO_PLACE.format(name))


def why_not_loaded(name: str | Path, error: BaseException) -> str:
    """Why a model could not be loaded and what to do, in a line, by the loading's `error`."""
    if not Path(name).is_dir():
        fetched = is_hub_id(str(name))
        return f"no folder {name} here, and {why_not_fetched(str(name), error)}" if fetched else NO_PLACE.format(name)
    if "Unrecognized configuration class" in str(error):
        return (
            f"{name} is no model of text alone that transformers' AutoModelForCausalLM knows\nchoose another seed model"
        )
    sentence = " ".join(str(error).split()).partition(". ")[0].rstrip(".:") or type(error).__name__
    return f"{name} can't be loaded ({sentence})\nis it whole, and of a kind that this transformers knows?"


def seed_model_of(name: str, adapter: str | Path) -> str:
    """Where the seed model of an adapter is now: at `name`, where its training had it, or, if that
    folder is gone, at the same place in a run's folder that was moved with both inside.
    """
    parts = Path(name).parts
    if not Path(name).is_dir():
        for folder in Path(adapter).resolve().parents[:2]:
            for start in range(1, len(parts)):
                if (found := folder.joinpath(*parts[start:])).joinpath("config.json").is_file():
                    return str(found)
    return name
