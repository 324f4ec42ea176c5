"""The judge that writes a run's reasonings, run by what is fastest here.

On a CPU that is llama.cpp. The judge becomes a GGUF file, with the weights that training has, which
lies in the cache folder and is known by its content. The adapter is merged: beside the weights it
would make llama.cpp take a third longer. A GPU is measured.
"""

import hashlib
import json
import logging
import math
import os
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch
from filelock import FileLock

from tract_lite.data.files import cache_folder, fingerprint
from tract_lite.data.jsonl import read_json
from tract_lite.data.places import content_of, seed_model_of
from tract_lite.engines.llama_cpp import quiet_llama
from tract_lite.engines.pace import measure_pace
from tract_lite.engines.task import Task, room_for
from tract_lite.export.adapter import CONFIG_FILE, WEIGHTS_FILE
from tract_lite.export.converter import convert_model
from tract_lite.export.exportable import check_convertible, check_folder, check_texts
from tract_lite.export.merge import merge_adapter, write_as_trained
from tract_lite.export.model_folder import seed_folder, work_folder
from tract_lite.export.parity import reading_limit
from tract_lite.judge import AnyPath, Judge
from tract_lite.prompt import prompt_ids
from tract_lite.record import Record
from tract_lite.scale import ScoreScale
from tract_lite.spec import SPEC_FILE, JudgeSpec, make_spec
from tract_lite.training.precision import pick_4bit, pick_dtype
from tract_lite.training.seed_model import free_memory
from tract_lite.training.settings import ADAPTER

logger = logging.getLogger(__name__)

# How many files the cache keeps: those that were used last.
KEPT = 4
LLAMA_CPP, TRANSFORMERS = "llama.cpp", "transformers"
MEASURED_SECONDS, MEASURED_RECORDS = 1.0, 64

Openers = Mapping[str, Callable[[], Judge]]


def reasoning_judge(
    adapter: AnyPath | None = None,
    *,
    seed_model: AnyPath | None = None,
    scale: ScoreScale | None = None,
    records: Sequence[Record] = (),
    parallel: int = 16,
    **options: Any,
) -> Judge:
    """A trained adapter's judge, or without one that of the seed model, for `generate_cots`.

    `adapter` and `seed_model` are as for `Judge.from_adapter`; without an adapter, `scale` and
    `options` are as for `Judge.from_seed`. Whatever runs it, it is the same judge: what one has
    begun, another goes on with. Where llama.cpp or its converter can't have the model, transformers
    runs it, and the log says why. On a GPU each way is measured for a second on some `records`.
    `parallel` reasonings are written at once by transformers; llama.cpp takes as many as its memory
    holds.
    Raises ValueError: no adapter there, or one without a judge spec; else as those two.
    """
    ways: dict[str, Callable[[], Judge]] = {}
    ways[LLAMA_CPP] = partial(open_in_llama_cpp, adapter, seed_model=seed_model, scale=scale, **options)
    if adapter is not None:
        opened: dict[str, Any] = {"seed_model": seed_model, "parallel": parallel, "precision": options.get("precision")}
        ways[TRANSFORMERS] = partial(Judge.from_adapter, adapter, **opened)
    elif seed_model is not None and scale is not None:
        ways[TRANSFORMERS] = partial(Judge.from_seed, seed_model, scale, parallel=parallel, **options)
    else:
        raise ValueError("name an adapter, or a seed model and its scale")
    return open_fastest(ways, records)


def open_fastest(ways: Openers, records: Sequence[Record], *, measure: bool | None = None) -> Judge:
    """The same judge by the way that writes fastest on `records`, or by the first that works.

    `measure`: None for where there is a GPU. What goes wrong with the last way is told as it is.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu and not quiet_llama().llama_supports_gpu_offload():
        ways = {name: way for name, way in ways.items() if name != LLAMA_CPP}
    rates: dict[str, float] = {}
    if len(ways) > 1 and records and (on_gpu if measure is None else measure):
        for name in ways:
            with _told(name), ways[name]() as judge:
                rates[name] = _tokens_a_second(judge, records)
            free_memory()
    # Those that were measured, the fastest first, or else all in their order.
    *others, last = sorted(rates, key=lambda name: -rates[name]) or ways
    shown = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    measured = f" (tokens a second: {shown})" if shown else ""
    for name in others:
        with _told(name):
            judge = ways[name]()
            logger.info("%s writes the reasonings%s", name, measured)
            return judge
    logger.info("%s writes the reasonings%s", last, measured)
    return ways[last]()


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Whatever goes wrong with a way is told, as there are other ones."""
    try:
        yield
    except Exception as error:
        logger.warning("%s can't write the reasonings here: %s", name, str(error).partition("\n")[0])


def _tokens_a_second(judge: Judge, records: Sequence[Record]) -> float:
    """How fast a judge writes; as fast as any where no prompt is there to measure it on."""
    prompts = []
    for record in records[:MEASURED_RECORDS]:
        with suppress(ValueError):
            prompt = prompt_ids(record, judge.spec, judge.engine.vocabulary)
            if room_for(Task(prompt, [0]), judge.spec, judge.spec.max_length):
                prompts.append(prompt)
    return 1 / max(measure_pace(judge.engine, prompts, MEASURED_SECONDS).token, 1e-9) if prompts else math.inf


def open_in_llama_cpp(
    adapter: AnyPath | None = None,
    *,
    seed_model: AnyPath | None = None,
    scale: ScoreScale | None = None,
    **options: Any,
) -> Judge:
    """The judge of `reasoning_judge` in llama.cpp; what it needs is made, unless it is there.
    Raises ValueError: the adapter or the seed model is none that llama.cpp can run.
    Raises RuntimeError: the converter is out of reach or failed, or the disk has no room.
    """
    if adapter is None:
        assert seed_model is not None and scale is not None
        seed_dir = seed_folder(seed_model)
        spec = _spec_of_seed(seed_model, seed_dir, scale, **options)
        identity = {"seed_model": content_of(seed_model) or str(seed_model)}
    else:
        adapter = Path(adapter)
        adapter = adapter / ADAPTER if (adapter / ADAPTER).is_dir() else adapter
        spec = JudgeSpec.load(adapter)
        own = Path(seed_model_of(spec.base_model, adapter))
        # Of a hub id, a copy in 4 bits may have been trained; a folder may be gone.
        if seed_model is None or not (Path(seed_model).is_dir() or own.is_absolute() and not own.is_dir()):
            seed_model = seed_model_of(spec.base_model, adapter)
        seed_dir = seed_folder(seed_model)
        identity = {"adapter": fingerprint(adapter / WEIGHTS_FILE)}
    judge = Judge.from_gguf(_judge_gguf(adapter, seed_dir, spec), spec)
    # The same as in transformers: a file in another type is no other judge.
    judge.engine.identity = identity
    return judge


def _judge_gguf(adapter: Path | None, seed_dir: Path, spec: JudgeSpec) -> Path:
    """The file of an adapter on its seed model, or of that alone, with the weights of training."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(seed_dir, trust_remote_code=False)
    limit = reading_limit(config)
    if limit and limit < spec.max_length:
        raise ValueError(f"beyond {limit} tokens it reads this seed model otherwise than it was trained")
    check_folder(seed_dir)
    in_4bit = spec.method.get("load_in_4bit", True)
    trained = [(adapter / name).read_bytes().hex() for name in (CONFIG_FILE, SPEC_FILE)] if adapter else []
    weights = fingerprint(adapter / WEIGHTS_FILE) if adapter else None
    file_type = "bf16" if spec.method.get("precision") == "bfloat16" else "f16"
    out = _cached(content_of(seed_dir), in_4bit, weights, *trained, file_type, quiet_llama().__version__)
    if not out.exists():
        with FileLock(f"{out}.lock"):
            if not out.exists():
                logger.info("written as GGUF, for its reasonings: %s", adapter or seed_dir)
                _write(out, adapter, seed_dir, spec, in_4bit, file_type)
        _keep_few(out)
    with suppress(OSError):
        # A cache folder may be one to read from alone.
        os.utime(out)
    return out


def _write(out: Path, adapter: Path | None, seed_dir: Path, spec: JudgeSpec, in_4bit: bool, file_type: str) -> None:
    from transformers import AutoTokenizer

    check_convertible(seed_dir, is_seed=True)
    with work_folder(out, _needed_bytes(seed_dir), "let TRACT_LITE_CACHE name one") as folder:
        source, part = folder / "weights", folder / "judge.gguf"
        if adapter:
            merge_adapter(seed_dir, adapter, source)
        elif in_4bit:
            write_as_trained(seed_dir, source)
        else:
            source = seed_dir
        convert_model(source, part, file_type, None)
        check_texts(part, spec, AutoTokenizer.from_pretrained(seed_dir))
        os.replace(part, out)


def _keep_few(newest: Path) -> None:
    """Delete the files that were not used for longest, but for the newest one."""

    def used(file: Path) -> float:
        with suppress(OSError):
            return file.stat().st_mtime
        return 0.0

    others = sorted((file for file in newest.parent.glob("*.gguf") if file != newest), key=used)
    for old in others[: max(0, len(others) + 1 - KEPT)]:
        # On Windows, a file in use stays.
        with suppress(OSError):
            old.unlink()
            Path(f"{old}.lock").unlink()


def _spec_of_seed(
    seed_model: AnyPath,
    seed_dir: Path,
    scale: ScoreScale,
    *,
    load_in_4bit: bool | None = None,
    precision: str | None = None,
    max_length: int = 3000,
    **fields: Any,
) -> JudgeSpec:
    """The spec that `open_seed_model` makes, without loading the weights."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(seed_dir, trust_remote_code=False)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or max_length
    in_4bit = _is_packed(seed_dir) or pick_4bit(load_in_4bit)
    method = {"load_in_4bit": in_4bit, "precision": str(pick_dtype(precision)[0]).removeprefix("torch.")}
    fields |= {"max_length": min(max_length, longest), "base_model": str(seed_model), "method": method}
    return make_spec(AutoTokenizer.from_pretrained(seed_dir, trust_remote_code=False), scale, **fields)


def _is_packed(seed_dir: Path) -> bool:
    """Whether the files hold weights in 4 bits."""
    return bool((read_json(seed_dir / "config.json").get("quantization_config") or {}).get("load_in_4bit"))


def _needed_bytes(seed_dir: Path) -> int:
    """Disk for the file and for the weights that it is made of."""
    stored = sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in seed_dir.glob(kind))
    return stored * (8 if _is_packed(seed_dir) else 2)


def _cached(*content: Any) -> Path:
    """Where the cache folder has, or is to have, what is made of this content."""
    folder = cache_folder() / "judges"
    folder.mkdir(exist_ok=True)
    return folder / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()}.gguf"
