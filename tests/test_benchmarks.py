"""The benchmarks at their smallest sizes: what they print is there and makes sense."""

from __future__ import annotations

import importlib
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tract_lite.training.seed_model import load_seed

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def measure(load) -> ModuleType:
    return load("measure")


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, BENCHMARKS / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_tables(text: str) -> list[dict[str, list[str]]]:
    """The Markdown tables of a text, each as {first cell: other cells}, headings left out."""
    tables = []
    for part in text.split("\n\n"):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
        if cells:
            tables.append({first: others for first, *others in cells})
    return tables


def number(cell: str) -> float:
    return float(cell.split()[0].replace(",", ""))


@pytest.fixture(scope="module")
def loss_output() -> str:
    return run("loss.py", "--smallest")


@pytest.fixture(scope="module")
def training_output(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("random")
    sizes = ("--tokens", "1024", "--steps", "1")
    return run("train_gpu.py", "--model", "tiny", "--folder", str(folder), *sizes)


def test_every_way_of_the_loss_has_its_time_and_memory(loss_output):
    rows, _ = read_tables(loss_output)
    torch_ce = hasattr(torch.nn.functional, "linear_cross_entropy")
    assert len(rows) == (4 if torch_ce else 3)
    for loss, seconds, _, megabytes, _ in rows.values():
        assert number(loss) > 0 and number(seconds) > 0 and number(megabytes) > 0


def test_the_ways_compared_compute_the_same_loss(loss_output):
    losses = [number(row[0]) for row in read_tables(loss_output)[0].values()]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2:] == pytest.approx([losses[2]] * len(losses[2:]), rel=1e-4)
    assert losses[0] > losses[2]


def test_a_ratio_stands_beside_its_bar_and_whether_it_is_kept(loss_output):
    ours = read_tables(loss_output)[0]["cot_raft_loss"]
    for cell, bar in ((ours[2], 0.3), (ours[4], 0.05)):
        kept = "ok" if number(cell) <= bar else "MISSED"
        assert cell.endswith(f"(bar {bar}: {kept})")


@on_linux
def test_memory_grows_with_the_length_in_the_plain_way_only(loss_output):
    lengths = read_tables(loss_output)[1]
    assert list(lengths) == ["256", "512", "1,024", "2,048"]
    plain, ours = ([number(row[column]) for row in lengths.values()] for column in (0, 1))
    assert plain[-1] == pytest.approx(8 * plain[0], rel=0.2)
    assert ours[-1] == pytest.approx(ours[0], rel=0.5)


def test_the_plain_way_is_not_run_where_it_would_not_fit(load):
    options = Namespace(tokens=64, repeats=1, supervised=0.2, hidden=8, vocabulary=256, dtype="float32")
    comparison = load("loss").Comparison(options)
    assert comparison.too_large(64) is None
    assert comparison.too_large(10**9).startswith("not run: needs 4096.0 GB")


def test_training_reports_time_and_memory_of_every_way(training_output):
    (rows,) = read_tables(training_output)
    plain, ours, _ = rows.values()
    for row in (plain, ours):
        seconds, per_second, loaded, peak = (number(row[column]) for column in (1, 2, 4, 5))
        assert per_second == pytest.approx(1024 / seconds, rel=0.05)
        assert 0 < loaded <= peak
    assert number(ours[0]) == pytest.approx(number(plain[0]), rel=1e-3)
    assert number(plain[6]) == 1 and 0 < number(ours[6]) < 1


@without_gpu
def test_training_without_a_gpu_says_what_is_missing_and_goes_on(training_output):
    (rows,) = read_tables(training_output)
    assert rows["Unsloth, cot_raft_loss"][0] == "failed"
    assert training_output.rstrip().splitlines()[-1].startswith("Unsloth, cot_raft_loss: Runtime")
    assert [row[-2:] for row in rows.values()][:2] == [["no GPU"] * 2] * 2


@without_gpu
def test_a_large_model_without_a_gpu_is_refused_with_a_way_out():
    done = subprocess.run([sys.executable, BENCHMARKS / "train_gpu.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "--model tiny does not" in done.stderr


@pytest.mark.parametrize("model, count", [("llama", 8_030_261_248), ("mistral", 7_241_732_096)])
def test_the_random_models_have_the_size_of_the_real_ones(load, model, count):
    skeleton = load("train_gpu").make_skeleton(model, torch.bfloat16)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in skeleton.parameters()) == count


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_checkpoint_is_in_4_bits_but_for_embeddings_and_head(load, family, monkeypatch, tmp_path):
    from bitsandbytes.functional import dequantize_4bit

    train_gpu = load("train_gpu")
    tiny = {**train_gpu.SHAPES["tiny"], "model_type": family}
    monkeypatch.setitem(train_gpu.SHAPES, "tiny", tiny)
    train_gpu.write_checkpoint("tiny", str(tmp_path))
    model, _ = load_seed(tmp_path, backend="transformers")
    assert model.config.model_type == family
    for name, parameter in model.named_parameters():
        weight = parameter
        if "_proj" in name:
            assert parameter.dtype == torch.uint8 and parameter.quant_state.nested
            weight = dequantize_4bit(parameter.data, parameter.quant_state)
        expected = 0.0 if "norm" in name else 0.02
        assert weight.float().std().item() == pytest.approx(expected, rel=0.05)


@on_linux
def test_the_peak_counts_memory_that_was_given_back(measure):
    measure.reset_peak_memory()
    before = measure.memory_in_use()
    held = b"x" * (200 * measure.MB)
    del held
    assert measure.memory_in_use() - before < 50 * measure.MB
    assert 190 * measure.MB < measure.peak_memory() - before < 250 * measure.MB


def test_functions_that_are_timed_take_turns(measure):
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = measure.interleaved_seconds(functions, 3)
    assert calls == list("ababab") and set(seconds) == {"a", "b"}


@pytest.mark.parametrize(
    "body, why",
    [
        ("measure.answer(lambda: {'bytes': 3}, job)", {"bytes": 3}),
        ("measure.answer(lambda: 1 / 0, job)", {"error": "ZeroDivisionError: division by zero"}),
        ("import os; os.kill(os.getpid(), 9)", {"error": "killed by signal 9 (9: out of memory)"}),
        ("raise SystemExit(3)", {"error": "ended with exit code 3 and no answer"}),
    ],
)
def test_a_child_answers_or_says_why_it_does_not(measure, tmp_path, body, why):
    script = tmp_path / "script.py"
    head = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import measure\njob = sys.argv[2]"
    script.write_text(f"{head}\nprint('a word before')\n{body}\n")
    assert measure.in_child(script, {}) == why


@pytest.fixture(scope="module")
def judging_output() -> str:
    return run("judge.py", "--smallest")


def test_every_way_of_judging_has_its_speed_and_memory(judging_output):
    speeds, _ = read_tables(judging_output)
    assert len(speeds) == 7
    for n_cot, items, written, per_minute, _, peak in speeds.values():
        assert n_cot in ("1", "8") and number(items) >= 1
        assert 0 < number(written) <= 8 and number(per_minute) > 0 and number(peak) > 0


def test_a_speed_stands_beside_its_bar_and_whether_it_is_kept(judging_output):
    speeds, _ = read_tables(judging_output)
    for row, bar in zip((row for row in speeds.values() if "bar" in row[4]), (1.5, 2.5, 2.5)):
        plain = next(r for name, r in speeds.items() if "llama" in name and r[0] == row[0])
        faster = number(row[3]) / number(plain[3])
        assert number(row[4]) == pytest.approx(faster, abs=0.01)
        assert row[4].endswith(f"(bar {bar}: {'ok' if faster >= bar else 'MISSED'})")


def test_the_memory_of_the_engine_is_held_against_its_parts(judging_output):
    _, memory = read_tables(judging_output)
    assert len(memory) == 4
    for file, cache, repacked, allowed, peak in memory.values():
        assert number(file) > 0 and number(cache) > 0
        parts = number(file) + number(cache) + number(repacked) + 300
        assert number(allowed) == pytest.approx(parts, abs=2)
        assert peak.endswith("(ok)" if number(peak) <= number(allowed) else "(MISSED)")
    assert sum(number(row[2]) > 0 for row in memory.values()) == 1
