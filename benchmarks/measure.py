"""What the benchmarks share: memory, times, child processes, and how results are shown.

Torch is imported only where a GPU is asked about: the judge's benchmark does without it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
import traceback
from datetime import date
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import psutil

ROOT = Path(__file__).resolve().parents[1]
# A clone works without being installed.
sys.path.insert(0, str(ROOT))

GB = 10**9
MB = 10**6
RESULT = "RESULT "


def reset_peak_memory(device: str = "cpu") -> None:
    """Let the peak start again from what is in use (on the CPU: under Linux only)."""
    if device == "cuda":
        return _cuda().reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def memory_in_use(device: str = "cpu") -> int:
    """Bytes that this process holds: tensors on the GPU, or all of its memory.

    Outside Linux the most it has held so far, so that a peak minus this is still what came on top.
    """
    return _cuda().memory_allocated() if device == "cuda" else _status("VmRSS")


def peak_memory(device: str = "cpu") -> int:
    """The most bytes that this process has held since the reset."""
    return _cuda().max_memory_allocated() if device == "cuda" else _status("VmHWM")


def free_memory(device: str = "cpu") -> int:
    """Bytes that could still be had."""
    return _cuda().mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def _cuda() -> Any:
    import torch

    return torch.cuda


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def interleaved_seconds(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that all meet the same disturbances."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def in_child(
    script: str | Path, job: Mapping[str, Any], folder: Path | None = None, limit: float | None = None
) -> dict:
    """What `script --child JOB` answers from a process of its own; {"error": why} if it fails.

    After `limit` seconds it is killed, with all that it has started.
    """
    # Everything is made on the spot, so no library needs to ask a server for anything.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(Path(script).resolve()), "--child", json.dumps(job)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:.3g} seconds"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for line in reversed(output.splitlines()):
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    if process.returncode < 0:
        return {"error": f"killed by signal {-process.returncode} (9: out of memory)"}
    return {"error": f"ended with exit code {process.returncode} and no answer"}


def answer(function: Callable[..., dict], job: str) -> None:
    """The child's side of `in_child`: call `function` with the job and print what it returns."""
    try:
        result = function(**json.loads(job))
    except Exception as error:
        traceback.print_exc()
        first_line = next(iter(str(error).splitlines()), "")
        result = {"error": f"{type(error).__name__}: {first_line}"}
    print(f"\n{RESULT}{json.dumps(result)}", flush=True)


def ratio(value: float, plain: float | None, bar: float | None = None) -> str:
    """`value` as a share of `plain`, and whether it keeps below the bar."""
    if not plain:
        return ""
    share = f"{value / plain:.3f}"
    return share if bar is None else f"{share} (bar {bar:g}: {verdict(value <= bar * plain)})"


def verdict(passed: bool) -> str:
    return "ok" if passed else "MISSED"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths))
        )
        return "| " + " | ".join((first, *others)) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def machine(*packages: str) -> str:
    """Processor, cores, Python, versions of the packages that are there, date."""
    parts = [_processor(), f"{os.cpu_count()} cores", f"Python {platform.python_version()}"]
    for package in packages:
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([*parts, date.today().isoformat()])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
