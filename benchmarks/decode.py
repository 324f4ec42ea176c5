"""What one pass of llama.cpp costs on a CPU: by weight type, attention, cache and memory layout.

    python benchmarks/decode.py              # a random model of the shape of Llama-3.2-1B
    python benchmarks/decode.py --smallest   # shows that it works, and measures nothing

Every row has a process of its own: it reads a prompt, shares it among all sequences, and lets each
of them go on by one token at a time. The engine's own settings are the first row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Iterator, Sequence
from unittest.mock import patch

import measure
import numpy as np
from judge import FIRST_ID, Shape, write_seed
from measure import MB, in_child, table

from tract_lite.data.files import cache_folder
from tract_lite.engines.context import Context, usable_cpus
from tract_lite.engines.llama_cpp import has_amx, load_model, quiet_llama, system_info
from tract_lite.export.gguf import export_gguf

TYPES = ("q4_k_m", "q4_0", "q8_0", "bf16", "f16")
STEPS = 5


@dataclass(frozen=True)
class Row:
    """`prompts`, each shared by an equal part of the sequences. `apart`: a memory for each one."""

    name: str
    weights: str = "q4_k_m"
    repack: bool = False
    flash: bool | None = None
    cache: str = "f16"
    prompts: int = 1
    apart: bool = True
    sequences: int = 32


ROWS = (
    Row("q4_k_m, the engine's way"),
    *(Row(name, weights=name) for name in TYPES[1:]),
    Row("q4_k_m, repacked", repack=True),
    Row("q4_0, repacked", weights="q4_0", repack=True),
    Row("q4_k_m, 64 sequences", sequences=64),
    Row("q4_k_m, no flash attention", flash=False),
    Row("q4_k_m, q8_0 cache", cache="q8_0"),
    Row("q4_k_m, one memory, 1 prompt", apart=False),
    Row("q4_k_m, one memory, 4 prompts", apart=False, prompts=4),
    Row("q4_k_m, one memory, 4 prompts, no flash attention", apart=False, prompts=4, flash=False),
)


def make(shape: dict[str, int], folder: str) -> dict[str, Any]:
    """Write the random model in each type."""
    with TemporaryDirectory(dir=folder) as seed:
        spec = write_seed(Path(seed), Shape(**shape))
        export_gguf(seed, Path(folder, "random.gguf"), TYPES, spec, check=False)
    return {}


def run(row: dict[str, Any], path: str, prompt: int, threads: int) -> dict[str, Any]:
    """Tokens read a second, and milliseconds of a step of all sequences and of one alone."""
    row = Row(**row)
    model = load_model(path, use_extra_bufts=row.repack)
    with _layout(row, prompt):
        options: dict[str, Any] = {"threads": threads, "flash_attention": row.flash, "cache_type": row.cache}
        context = Context(model, row.sequences, prompt + 128, **options)
    ids = np.random.default_rng(0).integers(FIRST_ID, 200, prompt).tolist()
    each = row.sequences // row.prompts
    _read(context, ids, 0)
    context.clear()
    start = time.perf_counter()
    for number in range(row.prompts):
        _read(context, ids, number * each)
    reading = time.perf_counter() - start
    for number in range(row.sequences):
        if number % each:
            context.copy(number - number % each, number)
    everything, alone = ([_step(context, ids, prompt, n) for _ in range(STEPS)] for n in (row.sequences, 1))
    return {
        "read": row.prompts * prompt / reading,
        "step": statistics.median(everything),
        "alone": statistics.median(alone),
        "peak": measure.peak_memory(),
    }


def _read(context: Context, ids: Sequence[int], sequence: int) -> None:
    for start in range(0, len(ids), context.batch_size):
        piece = ids[start : start + context.batch_size]
        context.decode(piece, range(start, start + len(piece)), [sequence] * len(piece), [len(piece) - 1])


def _step(context: Context, ids: Sequence[int], position: int, count: int) -> float:
    """Milliseconds of one token for the first sequences, which then forget it."""
    start = time.perf_counter()
    context.decode(ids[:count], [position] * count, range(count), range(count))
    seconds = time.perf_counter() - start
    for sequence in range(count):
        context.cut(sequence, position)
    return 1000 * seconds


@contextmanager
def _layout(row: Row, prompt: int) -> Iterator[None]:
    """Where sequences are not `apart`: one memory for all, for which the engine has no switch."""
    llama = quiet_llama()
    original = llama.llama_init_from_model

    def in_one_memory(model: Any, params: Any) -> Any:
        params.kv_unified, params.n_ctx = True, row.prompts * prompt + row.sequences * 128
        return original(model, params)

    with patch.object(llama, "llama_init_from_model", original if row.apart else in_one_memory):
        yield


def child(job: str, **arguments: Any) -> dict[str, Any]:
    return {"make": make, "run": run}[job](**arguments)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--smallest", action="store_true", help="a tiny model, few tokens")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return measure.answer(child, options.child)
    shape = Shape(256, 2, 4, 2, 512, 2048) if options.smallest else Shape()
    prompt = 64 if options.smallest else 1000
    print(f"{measure.machine('llama_cpp_python', 'numpy')}, {options.threads} threads\n{system_info().strip()}\n")
    rows = []
    with TemporaryDirectory(dir=cache_folder()) as folder:
        made = in_child(__file__, {"job": "make", "shape": asdict(shape), "folder": folder})
        if "error" in made:
            raise SystemExit(f"no model: {made['error']}")
        for row in ROWS:
            rows.append([row.name, str(row.sequences), *_measured(row, Path(folder), prompt, options.threads)])
            print(" ".join(rows[-1]), flush=True)
    header = ["way", "sequences", "file MB", "read, tokens/s", "step, ms", "a token, ms", "one alone, ms", "peak MB"]
    print(f"\nprompts of {prompt:,} tokens\n\n{table(header, rows)}")


def _measured(row: Row, folder: Path, prompt: int, threads: int) -> list[str]:
    path = folder / f"random-{row.weights}.gguf"
    if row.repack and has_amx():
        return ["", "crashes with AMX", *[""] * 4]
    job = {"job": "run", "row": asdict(row), "path": str(path), "prompt": prompt, "threads": threads}
    found = in_child(__file__, job)
    if "error" in found:
        return ["", found["error"], *[""] * 4]
    figures = found["read"], found["step"], found["step"] / row.sequences, found["alone"]
    size, peak = path.stat().st_size / MB, found["peak"] / MB
    return [f"{size:,.0f}", *(f"{figure:.{digits}f}" for figure, digits in zip(figures, (0, 0, 1, 0))), f"{peak:,.0f}"]


if __name__ == "__main__":
    main()
