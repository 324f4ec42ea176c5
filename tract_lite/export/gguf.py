"""A judge to GGUF: its whole model, or its adapter alone; checked before it gets its name."""

import os
import re
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, Sequence

from tract_lite.data.jsonl import read_json, write_json
from tract_lite.engines.llama_cpp import read_spec
from tract_lite.engines.trial import check_runs
from tract_lite.export.adapter import Adapter
from tract_lite.export.converter import check_types, convert_adapter, convert_model, quantize
from tract_lite.export.exportable import check_convertible, check_folder, check_reading
from tract_lite.export.model_folder import copy_other_files, seed_folder, work_folder
from tract_lite.export.parity import check_export
from tract_lite.record import Record
from tract_lite.spec import SPEC_FILE, JudgeSpec
from tract_lite.vocabulary import TransformersVocabulary

# What the converter writes without loss, or nearly; it knows q8_0 as well.
EXACT = ("f32", "bf16", "f16")
_BITS = {"f32": 32, "bf16": 16, "f16": 16, "auto": 16, "q8_0": 8.5}


def export_gguf(
    model_dir: str | Path,
    out: str | Path,
    quantization: str | Sequence[str] = "f16",
    spec: JudgeSpec | None = None,
    *,
    check: bool = True,
    records: Sequence[Record] | None = None,
    figures: str | Path | None = None,
) -> Path | list[Path]:
    """Write a model folder as GGUF with the judge's spec inside, and check what was written.

    `quantization`: one of llama.cpp's file types ("f16", "q8_0", "q4_k_m", ..., in any case), or
    several: then `judge.gguf` stands for `judge-q8_0.gguf`, `judge-q4_k_m.gguf`, and a list comes
    back. `spec` is the folder's own unless given; without any, nothing is checked. `check`: see
    `parity.check_export`, on `records` or made-up ones. `figures`: a JSON file that gets what it
    has measured, by file name. No file has its name before it is complete and checked.
    Raises ValueError: a type that is unknown or needs an importance matrix, a folder that lacks
        something, another vocabulary's spec, or a model with which llama.cpp ends its process.
    Raises RuntimeError: the converter is out of reach, llama.cpp could not write the file, it reads
        other tokens than transformers, or the disk has no room.
    """
    model_dir, out = Path(model_dir), Path(out)
    single = isinstance(quantization, str)
    asked = [quantization] if isinstance(quantization, str) else list(dict.fromkeys(quantization))
    check_types(asked)
    names = [name.lower() for name in asked]
    # A dot in a name is not always that of a suffix.
    stem, suffix = (out.stem, out.suffix) if out.suffix == ".gguf" else (out.name, "")
    targets = [out] if single else [out.with_name(f"{stem}-{name}{suffix}") for name in asked]
    if folders := [str(target) for target in targets if target.is_dir()]:
        raise ValueError(f"{', '.join(folders)} is a folder: name a file")
    check_folder(model_dir)
    check_convertible(model_dir)
    if spec is None and (model_dir / SPEC_FILE).is_file():
        spec = JudgeSpec.load(model_dir)
    tokenizer = _tokenizer(model_dir, spec) if check and spec else None
    weights = _count_weights(model_dir)
    size = _needed_bytes(model_dir, weights, names)
    with work_folder(out, size, "export fewer or smaller types at a time") as folder:
        files = _write(model_dir, folder, names, spec)
        for file in files.values():
            check_runs(file)
        measured = check_export(spec, tokenizer, model_dir, files, weights, records or ()) if tokenizer and spec else {}
        if figures:
            by_file = {t.name: asdict(measured[n]) for n, t in zip(names, targets) if n in measured}
            write_json(figures, read_json(figures) | by_file)
        for name, target in zip(names, targets):
            os.replace(files[name], target)
    return targets[0] if single else targets


def export_adapter(
    adapter_dir: str | Path,
    seed_model: str | Path,
    out: str | Path,
    spec: JudgeSpec | None = None,
    *,
    check: bool = True,
) -> Path:
    """Write a LoRA adapter alone as GGUF with the judge's spec inside, tens of MB without a merge.

    llama.cpp adds it to its seed model's GGUF file when it is loaded, so one such file serves many
    judges: `Judge.from_gguf(base, adapter=out)`. `seed_model`: a folder or hub id, of which only
    config and tokenizer are needed. `spec` is the adapter's own unless given. `check`: see
    `exportable.check_reading`; scores hang on the base file and are not compared.

    The base file rounds the seed model otherwise than training did. In the example (scale 1 to 5),
    scores differ from the trained judge's by 0.021 on average with an f16 or q8_0 base and by 0.034
    with q4_k_m, and by 0.016 if merged and quantised to q4_k_m.
    Raises ValueError: no adapter, one of another seed model or that must be merged, or no spec.
    Raises RuntimeError: the converter is out of reach or failed, llama.cpp reads other tokens than
        transformers, or the disk has no room.
    """
    changes, out = Adapter(adapter_dir), Path(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name a file")
    spec = spec or JudgeSpec.load(adapter_dir)
    seed_dir = seed_folder(seed_model, weights=False)
    changes.check_seed(seed_model, seed_dir)
    changes.check_alone()
    check_folder(seed_dir)
    tokenizer = _tokenizer(seed_dir, spec) if check else None
    with work_folder(out, 4 * changes.size) as folder:
        base, adapter, part = folder / "seed", folder / "adapter", folder / "part.gguf"
        base.mkdir()
        copy_other_files(seed_dir, base)
        changes.save_for_llama_cpp(adapter)
        convert_adapter(adapter, base, part, spec)
        if tokenizer:
            check_reading(base, folder / "vocabulary.gguf", spec, tokenizer)
        os.replace(part, out)
    return out


def _write(model_dir: Path, folder: Path, names: Sequence[str], spec: JudgeSpec | None) -> dict[str, Path]:
    """The GGUF file of each type, in a work folder."""
    source = _source(names)
    files = {name: folder / f"{name}.gguf" for name in dict.fromkeys([source, *names])}
    for name, file in files.items():
        if name in (source, *EXACT):
            convert_model(model_dir, file, name, spec)
        else:
            quantize(files[source], file, name)
        found = read_spec(file)
        if spec and (found is None or found.to_json() != spec.to_json()):
            raise RuntimeError("the judge's spec did not survive the export")
    return {name: files[name] for name in names}


def _source(names: Sequence[str]) -> str:
    """The type to make the others of: the most exact one that is asked for, else 16 bits."""
    exact = [name for name in EXACT if name in names]
    return exact[0] if exact else "q8_0" if set(names) == {"q8_0"} else "auto"


def _tokenizer(folder: Path, spec: JudgeSpec) -> Any:
    """The folder's tokenizer, if the spec was made for it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec.check_vocabulary(TransformersVocabulary(tokenizer))
    return tokenizer


def _count_weights(model_dir: Path) -> int:
    from safetensors import safe_open

    count = 0
    for file in model_dir.glob("model*.safetensors"):
        with safe_open(file, "np") as opened:
            count += sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())
    # Older folders hold 16 bits a weight in another format.
    return count or sum(file.stat().st_size for file in model_dir.glob("*.bin")) // 2


def _needed_bytes(model_dir: Path, weights: int, names: Sequence[str]) -> int:
    """Disk for all types and for the one that they are made of."""
    # Types such as q4_k_m keep some weights in more bits than their name says, up to 2 on average.
    bits = [_BITS.get(name) or int(re.findall(r"\d+", name)[0]) + 2 for name in {_source(names), *names}]
    others = sum(file.stat().st_size for file in model_dir.glob("*token*"))
    return round(weights * sum(bits) / 8) + len(bits) * others
