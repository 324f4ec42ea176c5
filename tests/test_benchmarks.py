"""The benchmarks at their smallest sizes: what they print is there and makes sense."""

from __future__ import annotations

import importlib
import io
import json
import mmap
import os
import random
import re
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import llama_cpp
import numpy as np
import pytest
import torch
from servers import llama_server_path
from tiny import make_plain_judge

from tract_lite.engines.llama_cpp import has_amx, read_spec
from tract_lite.scale import ScoreScale
from tract_lite.training.seed_model import load_seed

pytestmark = pytest.mark.export

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
# A whole script; what it calls is tested on its own besides.
whole = pytest.mark.long


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def measure(load) -> ModuleType:
    return load("measure")


def start(script: str, *arguments: str, gpu: bool = True) -> subprocess.CompletedProcess:
    environment = os.environ if gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, BENCHMARKS / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def run(script: str, *arguments: str, gpu: bool = True) -> str:
    done = start(script, *arguments, gpu=gpu)
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


def train_tiny(folder: Path, gpu: bool) -> str:
    sizes = ("--tokens", "1024", "--steps", "1")
    return run("train_gpu.py", "--model", "tiny", "--folder", str(folder), *sizes, gpu=gpu)


@pytest.fixture(scope="module")
def training_output(tmp_path_factory) -> str:
    return train_tiny(tmp_path_factory.mktemp("random"), gpu=True)


@pytest.fixture(scope="module")
def output_without_gpu(training_output, tmp_path_factory) -> str:
    return train_tiny(tmp_path_factory.mktemp("cpu"), gpu=False) if torch.cuda.is_available() else training_output


@whole
def test_every_way_of_the_loss_has_its_time_and_memory(loss_output):
    rows, _, capped = read_tables(loss_output)
    torch_ce = hasattr(torch.nn.functional, "linear_cross_entropy")
    assert len(rows) == (4 if torch_ce else 3) and len(capped) == 2
    for loss, seconds, _, megabytes, _ in [*rows.values(), *capped.values()]:
        assert number(loss) > 0 and number(seconds) > 0 and number(megabytes) > 0


def assert_same_losses(losses: list[float]) -> None:
    """The first two have both terms, the others the plain one alone."""
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2:] == pytest.approx([losses[2]] * len(losses[2:]), rel=1e-4)
    assert losses[0] > losses[2]


@whole
def test_the_ways_compared_show_the_same_loss(loss_output):
    assert_same_losses([number(row[0]) for row in read_tables(loss_output)[0].values()])


def test_the_ways_compared_compute_the_same_loss(load):
    loss = load("loss")
    data = loss.make_data(tokens=64, supervised=16, hidden=16, vocabulary=256, dtype="float32", device="cpu")
    options = Namespace(tokens=64, repeats=1, supervised=0.2, hidden=8, vocabulary=256, dtype="float32")
    assert_same_losses([loss.step(variant, **data) for variant in loss.Comparison(options).variants])


@whole
def test_a_ratio_stands_beside_its_bar_and_whether_it_is_kept(loss_output):
    tables = read_tables(loss_output)
    ours, capped = tables[0]["cot_raft_loss"], tables[2]["cot_raft_loss, soft-capped"]
    for cell, bar in ((ours[2], 0.3), (ours[4], 0.05), (capped[2], 1.15), (capped[4], 1.05)):
        kept = "ok" if number(cell) <= bar else "MISSED"
        assert cell.endswith(f"(bar {bar}: {kept})")


@whole
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


@whole
def test_training_reports_time_and_memory_of_every_way(training_output):
    (rows,) = read_tables(training_output)
    plain, ours, _ = rows.values()
    for row in (plain, ours):
        seconds, per_second, loaded, peak = (number(row[column]) for column in (1, 2, 4, 5))
        assert per_second == pytest.approx(1024 / seconds, rel=0.05)
        assert 0 < loaded <= peak
    assert number(ours[0]) == pytest.approx(number(plain[0]), rel=1e-3)
    assert number(plain[6]) == 1 and 0 < number(ours[6]) < 1


def test_a_step_of_training_has_its_time_and_memory_with_either_loss(load, tmp_path, float32_cpu):
    train_gpu = load("train_gpu")
    train_gpu.write_checkpoint("tiny", str(tmp_path))
    plain, ours = (train_gpu.train(variant, str(tmp_path), 256, 51, 1) for variant in ("plain", "transformers"))
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert all(figures["seconds"] > 0 and 0 < figures["loaded"] <= figures["peak"] for figures in (plain, ours))


@whole
def test_training_without_a_gpu_says_what_is_missing_and_goes_on(output_without_gpu):
    (rows,) = read_tables(output_without_gpu)
    assert rows["Unsloth, cot_raft_loss"][0] == "failed"
    assert output_without_gpu.rstrip().splitlines()[-1].startswith("Unsloth, cot_raft_loss: Runtime")
    assert [row[-2:] for row in rows.values()][:2] == [["no GPU"] * 2] * 2


def test_a_large_model_without_a_gpu_is_refused_with_a_way_out():
    done = start("train_gpu.py", gpu=False)
    assert done.returncode == 2 and "--model tiny does not" in done.stderr


@pytest.mark.parametrize("model, count", [("llama", 8_030_261_248), ("mistral", 7_241_732_096)])
def test_the_random_models_have_the_size_of_the_real_ones(load, model, count):
    skeleton = load("train_gpu").make_skeleton(model, torch.bfloat16)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in skeleton.parameters()) == count


def test_the_step_of_each_scale_is_measured_both_ways(load, monkeypatch, tmp_path):
    scales, train_cpu = load("scales"), load("train_cpu")
    monkeypatch.setitem(train_cpu.SHAPES, "toy", (64, 128, 1, 4, 2, 300, 2, 32))
    train_cpu.write_model("toy", tmp_path)
    for way in scales.WAYS:
        figures = scales.measure(way, str(tmp_path), "toy", repeats=1)
        assert figures["seconds"] > 0 and figures.keys() == {"seconds", "peak"}
    examples = scales.make_examples(ScoreScale.parse("1-10"), 2, 32, 300)
    # All are 6, and none holds the 1 that 10 begins with.
    assert [example.ids[example.score_position : -1] for example in examples] == [[9], [9]]


def test_training_on_a_cpu_computes_the_same_in_every_precision(load, monkeypatch, capsys):
    train_cpu = load("train_cpu")
    monkeypatch.setitem(train_cpu.SHAPES, "toy", (64, 128, 1, 4, 2, 300, 2, 32))
    train_cpu.compare("toy", repeats=1)
    [rows] = read_tables(capsys.readouterr().out)
    losses = [number(loss) for loss, _ in rows.values()]
    assert [*rows] == [*train_cpu.WAYS] and losses == pytest.approx([losses[-1]] * len(losses), rel=0.02)
    assert all(number(speed) > 0 for _, speed in rows.values())


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_checkpoint_is_in_4_bits_but_for_embeddings_and_head(load, family, monkeypatch, tmp_path):
    from bitsandbytes.functional import dequantize_4bit

    train_gpu = load("train_gpu")
    tiny = {**train_gpu.SHAPES["tiny"], "model_type": family}
    monkeypatch.setitem(train_gpu.SHAPES, "tiny", tiny)
    train_gpu.write_checkpoint("tiny", str(tmp_path))
    model, _ = load_seed(tmp_path, True, backend="transformers")
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


def test_a_child_that_takes_too_long_is_ended(measure, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import time; time.sleep(600)")
    assert measure.in_child(script, {}, limit=0.6) == {"error": "not done after 0.6 seconds"}


@whole
def test_every_check_of_a_gpu_is_done_or_says_what_broke():
    output = run("gpu_check.py", "--smallest", gpu=False)
    (rows,) = read_tables(output)
    broke = output.partition("What broke:\n")[2].splitlines()
    assert len(rows) == 15
    for name, (state, figures) in rows.items():
        works = name.endswith("transformers") and "float16" not in name
        assert state == ("ok" if works else "broke"), name
        assert bool(figures) == works and any(line.startswith(f"{name}: ") for line in broke) != works, name
    assert all(line.partition("Error: ")[2] for line in broke)


@pytest.fixture(scope="module")
def tiny_seed(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as patches:
        patches.syspath_prepend(str(BENCHMARKS))
        importlib.import_module("train_gpu").write_checkpoint("tiny", folder, model_type="qwen3", head_dim=16)
    return folder


def test_a_stage_and_judging_are_checked_on_a_seed_model_as_the_gpu_would(load, tiny_seed):
    gpu_check = load("gpu_check")
    found = gpu_check.stage("transformers", tiny_seed)
    assert 0 < found["loss"] != found["last loss"] > 0
    assert gpu_check.judge_padded("transformers", tiny_seed)["difference of scores"] < 1e-3
    assert gpu_check.write_reasonings("transformers", tiny_seed, 2, 4)["tokens/s"] > 0


def test_a_padded_text_with_another_score_is_found(load, tiny_seed, monkeypatch):
    engine, gpu_check = importlib.import_module("tract_lite.engines.transformers"), load("gpu_check")
    pad_left = engine.TransformersEngine._pad_left

    def unmasked(self, jobs):
        ids, mask = pad_left(self, jobs)
        return ids, torch.ones_like(mask)

    # In float32, and of weights as small as these.
    monkeypatch.setattr(gpu_check, "SCORE_TOLERANCE", 1e-5)
    gpu_check.judge_padded("transformers", tiny_seed)
    monkeypatch.setattr(engine.TransformersEngine, "_pad_left", unmasked)
    with pytest.raises(RuntimeError, match="alone, .* beside a longer text"):
        gpu_check.judge_padded("transformers", tiny_seed)


def test_checks_go_on_under_more_memory_until_their_time_is_over(load, monkeypatch, tmp_path, capsys):
    gpu_check, asked = load("gpu_check"), []
    answers = {15: {"error": "OutOfMemoryError: CUDA out of memory"}, 24: {"loss": 2.0, "tokens/s": 30.0}}

    def in_child(_, job, folder, limit):
        asked.append((job.get("cap_gb"), limit))
        return dict(answers.get(job.get("cap_gb"), {"loss": 1.0, "tokens/s": 10.0}))

    monkeypatch.setattr(gpu_check, "in_child", in_child)
    checks, job = gpu_check.Checks(tmp_path), {"job": "train", "folder": "large"}
    plain, ours = gpu_check.Check("plain", job), gpu_check.Check("ours", job, "plain", caps=(15, 24, 40))
    for check in (plain, ours):
        checks.run(check)
    checks.compare(ours)
    assert [cap for cap, _ in asked] == [None, 15, 24]
    assert checks.found["ours"]["fits GB"] == 24 and checks.found["ours"]["x speed"] == 3
    assert checks.found["ours"]["error"] == "the loss is 2.0000, and 1.0000 in 'plain'"
    checks.end = time.monotonic() + 60
    checks.run(plain)
    assert asked[-1][1] <= 60
    checks.end = time.monotonic() + 1
    checks.run(plain)
    assert checks.found["plain"] == {"error": "not run: no time left"} and len(asked) == 4
    assert "ours: loss 2, tokens/s 30, fits GB 24" in capsys.readouterr().out


@whole
@whole
def test_a_judge_of_support_is_trained_from_scores_alone_and_held_against_its_baselines(tmp_path):
    shown = run("support.py", "--smallest", "--out", str(tmp_path))
    compared = read_tables(shown)[-1]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    gained = metrics["rows"]["judge-q8_0.gguf, RAIL"]["better_by"]
    assert compared.keys() == gained.keys() and len(gained) == 3
    for name, (count, by, interval) in compared.items():
        low, high = gained[name]["intervals"]["rmse"]
        sure = "ok" if low > 0 else "MISSED"
        assert [count, by, interval] == [
            str(gained[name]["count"]),
            f"{gained[name]['rmse']:.3f}",
            f"{low:.3f} to {high:.3f} ({sure})",
        ]
    assert re.search(r"[\d.]+ minutes \(bar 45: (ok|MISSED)\)", shown)


def test_answers_of_support_are_scored_by_what_they_hold(load):
    support = load("support")
    rows = [support.make_row(random.Random(number), number) for number in range(400)]
    points = [
        sum(any(part in row["response"] for part in kind) for kind in (support.STEPS, support.TIMES, support.FRIENDLY))
        + ("The reason is that" in row["response"])
        for row in rows
    ]
    assert {row["score"] for row in rows} == {1, 2, 3, 4, 5}
    assert all(abs(row["score"] - 1 - held) <= 2 for row, held in zip(rows, points))
    assert np.corrcoef(points, [row["score"] for row in rows])[0, 1] > 0.85


@on_linux
def test_both_ways_of_the_export_have_their_times_and_memory():
    ways, layers = read_tables(run("export.py", "--smallest"))
    assert list(ways) == ["plain: load all, merge_and_unload", "merge_adapter"]
    for merge, _, rest, whole, _, megabytes, _ in ways.values():
        assert abs(number(whole) - number(merge) - number(rest)) < 0.11
        assert number(rest) > 0 and number(megabytes) > 0
    ours = ways["merge_adapter"]
    for cell, bar in ((ours[1], 0.8), (ours[4], 1), (ours[6], 0.35)):
        kept = "ok" if number(cell) <= bar else "MISSED"
        assert cell.endswith(f"(bar {bar}: {kept})")
    assert list(layers) == ["4", "8"]


@on_linux
def test_either_way_of_a_merge_has_its_time_and_memory(load, tmp_path):
    export = load("export")
    shape = {**export.SHAPE, **export.SMALLEST, "num_hidden_layers": 1}
    assert export.make_seed(str(tmp_path), shape)["weights"] > 0
    for way in (export.PLAIN, export.OURS):
        figures = export.export(way, str(tmp_path), whole=False)
        assert figures["merge"] > 0 and figures["rest"] >= 0
        # Of so small a merge, nothing may show in a process that has had more before.
        assert figures["bytes"] >= 0


@on_linux
def test_the_peak_of_a_merge_counts_what_was_given_back_but_no_mapped_file(load, measure, tmp_path):
    (tmp_path / "mapped").write_bytes(b"x" * (100 * measure.MB))
    with load("export").AnonymousPeak() as peak:
        held = b"x" * (200 * measure.MB)
        time.sleep(0.5)
        del held
        with open(tmp_path / "mapped", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped.find(b"y") == -1
    assert 190 * measure.MB < peak.bytes < 250 * measure.MB


# A processor with AMX can't show what one without it does, as it would crash.
@pytest.fixture(scope="module", params=sorted({has_amx(), True}), ids=lambda amx: f"AMX {amx}")
def judging(request) -> tuple[bool, str]:
    """Whether the processor has AMX, or says so, and what the benchmark prints there."""
    with pytest.MonkeyPatch.context() as patches, redirect_stdout(io.StringIO()) as output:
        patches.syspath_prepend(str(BENCHMARKS))
        judge = importlib.import_module("judge")
        patches.setattr(judge, "has_amx", lambda: request.param)
        judge.main(["--smallest", "--llama-server", str(llama_server_path())])
    return request.param, output.getvalue()


@whole
def test_every_way_of_judging_has_its_speed_and_memory(judging):
    amx, output = judging
    speeds, _ = read_tables(output)
    assert len(speeds) == 13
    missing = {name: row[1] for name, row in speeds.items() if row[3] == ""}
    assert missing == ({"ours, the same, repacked": "crashes with AMX"} if amx else {})
    for name in speeds.keys() - missing.keys():
        n_cot, items, written, per_minute, _, peak = speeds[name]
        assert n_cot in ("0", "1", "8") and number(items) >= 1 and number(per_minute) > 0
        assert 0 < number(written) <= 8 if n_cot != "0" else number(written) == 0
        assert peak == "" if "server" in name else number(peak) > 0


@whole
def test_a_speed_stands_beside_its_bar_and_whether_it_is_kept(judging):
    speeds, _ = read_tables(judging[1])
    bars = {
        "ours, unrelated prompts": ("llama-cpp-python, one at a time", "2"),
        "ours, one rubric and instruction": ("llama-cpp-python, one at a time", "3.5"),
        "ours, the same on 1-10": ("ours, one rubric and instruction", "0.87"),
        "ours, the same on 0-100": ("ours, one rubric and instruction", "0.67"),
        "ours, 8 reasonings an item": ("llama-cpp-python, prefix cache", "3"),
        "ours, the same without a reasoning": ("ours, short items under one rubric", "8"),
    }
    assert {name for name, row in speeds.items() if "bar" in row[4]} == set(bars)
    for name, (base, bar) in bars.items():
        row = speeds[name]
        faster = number(row[3]) / number(speeds[base][3])
        assert number(row[4]) == pytest.approx(faster, abs=0.01)
        assert row[4].endswith(f"(bar {bar}: {'ok' if faster >= float(bar) else 'MISSED'})")
    assert all(f"{name}: " in judging[1] for name in ("ours, unrelated prompts", "ours, 8 reasonings an item"))
    assert judging[1].count("x llama-server") == 2


@whole
def test_the_memory_of_the_engine_is_held_against_its_parts(judging):
    amx, output = judging
    _, memory = read_tables(output)
    assert len(memory) == 8 - amx
    for file, cache, repacked, allowed, peak in memory.values():
        assert number(file) > 0 and number(cache) > 0
        parts = number(file) + number(cache) + number(repacked) + 300
        assert number(allowed) == pytest.approx(parts, abs=2)
        assert peak.endswith("(ok)" if number(peak) <= number(allowed) else "(MISSED)")
    assert sum(number(row[2]) > 0 for row in memory.values()) == 1 - amx


@pytest.fixture(scope="module")
def path(shared_once) -> Path:
    return shared_once("plain_judge", make_plain_judge) / "judge.gguf"


@pytest.mark.parametrize("amx", [True, False])
def test_llama_cpp_python_s_own_model_is_loaded_as_it_comes_but_not_repacked_with_amx(load, path, monkeypatch, amx):
    asked, load_model = [], llama_cpp.llama_cpp.llama_model_load_from_file

    def spy(path, params):
        asked.append(params.use_extra_bufts)
        return load_model(path, params)

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_load_from_file", spy)
    load("judge").open_llama(str(path), 64, 1, read_spec(path), amx).close()
    by_default = llama_cpp.llama_model_default_params().use_extra_bufts
    assert asked == [by_default and not amx] and by_default


@pytest.mark.parametrize("function", ["plain", "logprobs", "ours"])
def test_each_way_judges_with_and_without_amx(load, path, function):
    judge = load("judge")
    way = judge.Way("this", function)
    for amx in (True, False):
        figures = judge.judge(
            judge.asdict(way), {"prompt": 20, "shared": 10, "reasoning": 4}, 300, str(path), 2, 1, 2, amx, ""
        )
        assert 0 < figures["written"] <= 4 and figures["seconds"] > 0 and figures["peak"] > figures["file"] > 0
        assert function != "ours" or any("KV" in name for name in figures["buffers"])


@pytest.mark.parametrize("amx", [True, False])
def test_the_repacked_way_is_left_out_with_amx_and_asked_for_without(load, path, monkeypatch, amx):
    judge, jobs = load("judge"), []
    result = {"seconds": 1.0, "written": 8.0, "peak": 9, "file": 1, "buffers": {"CPU KV": 2.0}}
    monkeypatch.setattr(judge, "has_amx", lambda: amx)
    monkeypatch.setattr(judge, "in_child", lambda _, job: jobs.append(job) or result)
    comparison = judge.Comparison(Namespace(smallest=True, parallel=8, threads=1, llama_server=""))
    results = {way: comparison.measure(way, path) for way in judge.WAYS}
    assert [job["amx"] for job in jobs] == [amx] * (11 - amx)
    assert sum(job["way"]["repack"] for job in jobs) == 1 - amx
    speeds, memory = read_tables(f"{comparison.speed_table(results)}\n\n{comparison.memory_table(results)}")
    assert len(speeds) == 13 and len(memory) == 8 - amx
    assert speeds["llama-server, unrelated prompts"][1] == "no llama-server"
    assert (speeds["ours, the same, repacked"][1] == "crashes with AMX") == amx
    assert sum("bar" in row[4] for row in speeds.values()) == 6


@pytest.mark.parametrize("choice", [{}, {"flash": True}, {"apart": False, "prompts": 2}])
def test_a_pass_of_each_kind_is_measured(load, path, choice):
    decode = load("decode")
    row = decode.Row("this", sequences=4, **choice)
    figures = decode.run(decode.asdict(row), str(path), 20, 1)
    assert min(figures.values()) > 0
    assert figures.keys() == {"read", "step", "alone", "peak"}


def test_a_row_that_would_crash_with_amx_is_named_and_not_run(load, monkeypatch, tmp_path):
    decode = load("decode")
    monkeypatch.setattr(decode, "has_amx", lambda: True)
    assert decode._measured(decode.Row("this", repack=True), tmp_path, 20, 1)[1] == "crashes with AMX"
