"""The recipe from end to end: what its demo shows, what it leaves, how it goes on when killed."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import example
import huggingface_hub
import pytest
import two_stage
from tiny import SHARED, make_it_stop, make_llama, make_spm, vocabulary_folder
from transformers import AutoTokenizer

from tract_lite import JudgeSpec, Run, ScoreScale, parse_options, preset_for, read_splits
from tract_lite.__main__ import main as judge_main
from tract_lite.data.jsonl import read_json, read_rows
from tract_lite.training.stage import newest_complete_checkpoint

TESTS = Path(__file__).parent
# Where the recipe is killed, one call after the other.
KILLED = {
    "data": r"counts\.json\.part$",
    "stage 1": r"stage1/checkpoint-\d+/complete\.json\.part$",
    "reasonings": r"self_generated(\.rejected)?\.jsonl$#4",
    "stage 2": r"stage2/stage\.json\.part$",
    "export": r"judge-q8_0\.gguf$",
    "judging": r"judged/judge-q8_0\.gguf\.jsonl$",
}


def test_the_example_is_the_same_for_the_same_seed_number() -> None:
    assert example.make_items(5, 7) == example.make_items(5, 7)
    assert example.make_items(5, 7) != example.make_items(5, 8)


def test_gold_scores_of_the_example_are_drawn_around_the_stated_mean() -> None:
    items = example.make_items(20_000, 5)
    errors = [item.record.score - item.mean for item in items]
    vague_tips = example.TIPS * example.SHARES["vague"]
    variance = example.CHANCE * (1 - example.CHANCE) * vague_tips
    assert abs(sum(errors) / len(errors)) < 4 * math.sqrt(variance / len(errors))
    assert math.isclose(sum(e * e for e in errors) / len(errors), variance, rel_tol=0.05)


# What the demo shows: bounds that several kinds of processors and random seeds keep.


@pytest.mark.training
def test_the_demo_judge_comes_near_the_best_possible_one(demo_run: Path) -> None:
    rows = read_json(demo_run / "metrics.json")["rows"]
    best = rows["true mean (best possible)"]["rmse"]
    for name in ("stage 2", "judge-f16.gguf", "judge-q8_0.gguf"):
        judge, most_likely = (rows[f"{name}, {reading}"] for reading in ("CoT-RAIL", "most likely label"))
        assert judge["count"] == 1000
        assert judge["rmse"] <= 1.2 * best
        assert judge["rmse"] <= 0.95 * most_likely["rmse"]


@pytest.mark.training
def test_the_second_stage_of_the_demo_is_worth_its_name(demo_run: Path) -> None:
    rows = read_json(demo_run / "metrics.json")["rows"]
    assert rows["stage 2, CoT-RAIL"]["rmse"] <= rows["stage 1, CoT-RAIL"]["rmse"] - 0.2
    assert rows["stage 2, CoT-RAIL"]["pearson"] > rows["stage 1, CoT-RAIL"]["pearson"]


@pytest.mark.training
@pytest.mark.parametrize("name, mean, largest", [("f16", 0.01, 0.05), ("q8_0", 0.05, 0.5)])
def test_the_demo_judge_is_the_same_in_gguf_and_in_transformers(
    demo_run: Path, name: str, mean: float, largest: float
) -> None:
    parity = read_json(demo_run / "metrics.json")["parity"][f"judge-{name}.gguf"]
    assert parity["different_prompts"] == 0 and parity["records"] == two_stage.CHECKED
    assert parity["mean_difference"] <= mean
    assert parity["largest_difference"] <= largest


@pytest.mark.training
def test_each_stage_of_the_demo_keeps_its_best_validated_adapter(demo_run: Path) -> None:
    for name, stage in Run(demo_run).stages().items():
        rmse = {entry["step"]: entry["eval_rmse"] for entry in stage["log"] if "eval_rmse" in entry}
        assert len(rmse) > 2 and stage["validation"] > 50, name
        assert rmse[stage["kept_step"]] == min(rmse.values()), name


# What a run leaves.


@pytest.mark.training
def test_a_run_folder_holds_what_a_user_looks_for(quick_run: Path) -> None:
    for name in """settings.json log.txt counts.json done.json metrics.json parity.json report.html report.md
        report.png README.md training.jsonl validation.jsonl held_out.jsonl example/data.jsonl self_generated.jsonl
        adapter.gguf judge-q8_0.gguf judged/judge-q8_0.gguf.jsonl stage1/adapter/adapter_model.safetensors
        stage2/stage.json merged/config.json merged/README.md""".split():
        assert (quick_run / name).exists(), name
    assert (quick_run / "judged" / "stage 1.jsonl").exists()
    assert JudgeSpec.load(quick_run / "merged").base_model
    assert not list(quick_run.rglob("*.part"))


@pytest.mark.training
def test_the_example_is_ordinary_data_in_the_folder(quick_run: Path, tmp_path: Path) -> None:
    files = quick_run / "example"
    command = ["--preset", "quick", "--data", str(files / "data.jsonl"), "--held-out", str(files / "held_out.jsonl")]
    splits = preset_for(parse_options(command)).splits
    again = Run(tmp_path).data(read_splits, **{**splits, "max_items": 640, "max_held_out": 100})
    for name in ("training", "validation", "held_out"):
        rows = read_rows(quick_run / f"{name}.jsonl")
        assert [row["id"] for row in rows] == [record.id for record in getattr(again, name)], name


@pytest.mark.training
def test_a_second_call_does_nothing_twice(quick_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("*.safetensors", "*.gguf", "*.jsonl")
    before = {path: path.stat().st_mtime_ns for kind in kinds for path in quick_run.rglob(kind)}
    two_stage.main(["--preset", "quick", "--out", str(quick_run)])
    assert before == {path: path.stat().st_mtime_ns for kind in kinds for path in quick_run.rglob(kind)}
    assert "| stage 2, CoT-RAIL " in capsys.readouterr().out


@pytest.mark.training
def test_a_run_folder_of_other_settings_is_refused(quick_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        two_stage.main(["--preset", "quick", "--epochs", "3", "--scale", "0-5", "--out", str(quick_run)])
    assert stopped.value.code == 2
    first, *lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert (
        first == f"error: {quick_run}/settings.json was made with other settings: "
        "choose another output, or these again:"
    )
    assert lines == ["  scale: 1-5 there, 0-5 now", "  epochs: 2.0 there, 3.0 now"]


@pytest.mark.training
def test_a_run_folder_that_was_moved_and_renamed_does_nothing_twice(quick_run: Path, tmp_path: Path) -> None:
    # A hard link each: the files are large, and as they were.
    moved = shutil.copytree(quick_run, tmp_path / "mein Öfchen", copy_function=os.link)
    kinds = ("*.safetensors", "*.gguf", "*.jsonl")
    before = {path: path.stat().st_mtime_ns for kind in kinds for path in moved.rglob(kind)}
    copied = "settings.json metrics.json report.html report.md report.png README.md log.txt done.json"
    for name in copied.split():
        shutil.copy(quick_run / name, tmp_path / name)
        os.replace(tmp_path / name, moved / name)
    two_stage.main(["--preset", "quick", "--out", str(moved)])
    assert before == {path: path.stat().st_mtime_ns for kind in kinds for path in moved.rglob(kind)}
    assert (moved / "report.md").read_text(encoding="utf-8").startswith("# mein Öfchen\n")


@pytest.mark.training
def test_a_run_goes_on_where_all_of_its_files_were_moved_and_later_options_are_chosen_then(
    quick_run: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "zweiter Ort"
    seed_model = shutil.copytree(JudgeSpec.load(quick_run / "merged").base_model, first / "seed")
    for name in ("data.jsonl", "held_out.jsonl", "template.jinja"):
        rows = (quick_run / "example" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (first / name).write_text("".join(rows if name.endswith("jinja") else rows[:8]), encoding="utf-8")

    def call(place: Path, *more: str) -> None:
        flags = {"--data": "data.jsonl", "--held-out": "held_out.jsonl", "--template": "template.jinja"}
        named = {**flags, "--seed-model": seed_model.name, "--out": "run"}.items()
        paths = [word for flag, name in named for word in (flag, str(place / name))]
        two_stage.main(["--preset", "quick", "--max-new-tokens", "64", *paths, *more])

    call(first, "--train-only", "--quantization", "f16")
    trained = {path.relative_to(first): path.stat().st_mtime_ns for path in first.rglob("adapter_model.safetensors")}
    first.rename(second)
    call(second, "--quantization", "q8_0")
    assert {
        path.relative_to(second): path.stat().st_mtime_ns for path in second.rglob("adapter_model.safetensors")
    } == trained
    rows = read_json(second / "run" / "metrics.json")["rows"]
    assert "judge-q8_0.gguf, CoT-RAIL" in rows and not list(second.rglob("*f16*"))
    call(second, "--quantization", "f16", "q8_0")
    assert "judge-f16.gguf, CoT-RAIL" in read_json(second / "run" / "metrics.json")["rows"]
    with pytest.raises(SystemExit):
        call(second, "--base", "16bit")


@pytest.mark.parametrize(
    "base, taken", [("4bit", "unsloth/model-unsloth-bnb-4bit"), ("16bit", "someone/Model"), ("16bit", ".")]
)
def test_a_merge_takes_what_was_trained_or_the_16_bits_that_the_user_named(
    base: str, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, scale = "unsloth/model-unsloth-bnb-4bit", ScoreScale.integers(1, 5)
    JudgeSpec("", scale, (), (), (), (), 0, base_model=copy).save(tmp_path)
    named = taken if base == "16bit" else "someone/Model"
    preset = preset_for(parse_options(["--preset", "24gb", "--seed-model", named, "--base", base]))
    merges: list[Any] = []
    (tmp_path / "adapter.gguf").touch()
    monkeypatch.setattr(two_stage, "merge_adapter", lambda seed_model, *_, base: merges.append((seed_model, base)))
    monkeypatch.setattr(two_stage, "export_gguf", lambda *_, **__: [])
    two_stage.export(tmp_path, Run(tmp_path), tmp_path, preset, [])
    assert merges == [(taken, base)]


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    file = tmp_path / "scores.csv"
    file.write_text("response,criteria,score\n" + "".join(f"text {n},Kind?,{n % 5 + 1}\n" for n in range(30)))
    return file


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--data none.csv", "no file none.csv"),
        ("--template none.jinja", "the template none.jinja can't be read"),
        ("--template bad.jinja", r"the template bad.jinja, line 2: "),
        ("--template latin.jinja", r"the template latin.jinja is not in UTF-8"),
        ("--out scores.csv", "the run folder scores.csv can't be made"),
        ("--out scores.csv/run", "the run folder scores.csv/run can't be made"),
        ("--scale 1-3", "unusable rows: 12"),
        ("--seed-model empty", "has no config.json"),
        ("--seed-model damaged", "damaged"),
        ("--seed-model ./none", r"\./none"),
        ("--seed-model none/model", "."),
        ("--quantization q9_9 --seed-model damaged", "q9_9"),
    ],
)
def test_what_a_user_can_mend_is_told_in_words_and_the_folder_stays_free(
    arguments: str,
    words: str,
    scores: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    # As where there is no network, without the time that finding out takes.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "bad.jinja").write_text("{{ response }}\n{% if %}")
    (tmp_path / "latin.jinja").write_bytes("Stärke {{ response }}".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    make_llama(tmp_path / "damaged", vocabulary_folder("spm"), context=512)
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"x" * 99)
    asked = ["--preset", "quick", "--data", "scores.csv", "--out", "run", *arguments.split()]
    with pytest.raises(SystemExit) as stopped:
        two_stage.main(asked)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in shown
    first, *more = shown[shown.index("error: ") :].strip().splitlines()
    assert re.search(words, first) and len(more) < 2
    if (tmp_path / "run").exists():
        assert "stopped by an error\nTraceback" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
        # Nothing is claimed: what is mended is taken.
        Run(tmp_path / "run").begin({"preset": "demo"})


# Benchmark data all the way, killed at every step.


def benchmark_rows() -> list[dict[str, Any]]:
    """Eight rows of a Prometheus benchmark; made up where the real ones are not at hand."""
    file = SHARED / "data" / "vicuna_eval.json"
    if file.exists():
        return json.loads(file.read_text())[:8]
    items = [[variant.record for variant in example.make_items(8, number)] for number in (21, 22, 23)]
    return [
        {
            "instruction": f"###The instruction to evaluate:\n{first.instruction}\n\n###Response to evaluate:\n"
            f"{first.response}\n\n###Score Rubrics:\n[{first.rubric.criteria}]\n\n###Feedback: ",
            "gpt4_score": [int(record.score) for record in (first, *others)],
            "gpt4_feedback": [record.feedback for record in (first, *others)],
        }
        for first, *others in zip(*items)
    ]


@pytest.fixture(scope="module")
def killed(shared_once: Callable[..., Path]) -> Path:
    """A folder with the `run` on benchmark data, and what each killed call had left of it."""

    def make(folder: Path) -> None:
        rows = benchmark_rows()
        texts = [text for row in rows for text in (row["instruction"], *row["gpt4_feedback"])]
        (folder / "benchmark.json").write_text(json.dumps(rows))
        spm = make_spm(folder / "spm", [line for text in texts for line in text.split("\n")], 4000)
        seed_model = make_llama(folder / "seed_model", spm, context=4096)
        make_it_stop(seed_model, AutoTokenizer.from_pretrained(spm).eos_token_id)
        command = f"--preset quick --data {folder}/benchmark.json --seed-model {seed_model} --out {folder}/run"
        command += " --max-items 4 --max-new-tokens 64 --quantization q8_0"
        done = subprocess.run(
            [sys.executable, TESTS / "killed.py", folder / "left", *KILLED.values(), "--", *command.split()],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        shutil.rmtree(seed_model)

    return shared_once("killed", make)


def left_by(killed: Path, step: str) -> Path:
    """What the call that was killed in this step had left."""
    return killed / "left" / str(list(KILLED).index(step) + 1)


@pytest.mark.training
def test_benchmark_data_go_the_whole_way(killed: Path) -> None:
    counts = read_json(killed / "run" / "metrics.json")["counts"]
    assert counts["items"] == 8 and counts["pairs"] == 24 and counts["bad_rows"] == 0
    assert counts["held_out_items"] == 2 and counts["held_out_pairs"] == 6
    # Of four items, with three annotators each.
    assert counts["training_records"] == 12 and counts["validation_records"] == 0
    stage = counts["stage1"]
    assert stage["records"] == stage["examples"] == 12
    assert stage["dropped"] == {} and stage["validation"] == 0
    reasonings = counts["self_generated"]
    assert reasonings["kept"] + sum(reasonings["rejected"].values()) == 12
    assert counts["stage2"]["examples"] == reasonings["kept"] > 0
    assert (killed / "run" / "judge-q8_0.gguf").exists()


@pytest.mark.training
def test_a_run_killed_at_every_step_ends_whole(killed: Path) -> None:
    run = killed / "run"
    assert not list(run.rglob("*.part"))
    names = [row["id"] for file in run.glob("self_generated*.jsonl") for row in read_rows(file)]
    assert sorted(names) == sorted(row["id"] for row in read_rows(run / "training.jsonl"))
    held_out = [row["id"] for row in read_rows(run / "held_out.jsonl")]
    for name in ("stage 1", "stage 2", "judge-q8_0.gguf"):
        assert [row["id"] for row in read_rows(run / "judged" / f"{name}.jsonl")] == held_out
    metrics = read_json(run / "metrics.json")
    # Each judge by three readings, the untrained seed model twice, and the training mean.
    assert len(metrics["rows"]) == 3 * (3 + 2) + 1 and metrics["parity"]["judge-q8_0.gguf"]["different_prompts"] == 0
    for name in ("report.md", "README.md", "adapter.gguf", "merged/README.md"):
        assert (run / name).exists()


@pytest.mark.training
def test_what_was_done_before_a_kill_is_not_done_again(killed: Path) -> None:
    run = killed / "run"
    assert not (left_by(killed, "data") / "held_out.jsonl").exists()
    stage1 = left_by(killed, "stage 1") / "stage1"
    assert list(stage1.glob("checkpoint-*")) and not newest_complete_checkpoint(stage1)
    rows = [
        line
        for file in left_by(killed, "reasonings").glob("self_generated*.jsonl")
        for line in file.read_bytes().splitlines()
    ]
    ends = b"".join(file.read_bytes() for file in run.glob("self_generated*.jsonl")).splitlines()
    assert len(rows) == 3 and set(rows) < set(ends)
    for later, name in (
        ("stage 1", "training.jsonl"),
        ("reasonings", "stage1/stage.json"),
        ("stage 2", "self_generated.jsonl"),
        ("export", "stage2/stage.json"),
        ("judging", "parity.json"),
        ("judging", "judged/stage 1.jsonl"),
        ("judging", "judged/stage 2.jsonl"),
    ):
        assert (left_by(killed, later) / name).read_bytes() == (run / name).read_bytes(), name
    stage2 = left_by(killed, "stage 2") / "stage2"
    assert not (stage2 / "stage.json").exists() and list(stage2.glob("checkpoint-*/complete.json"))
    # The figures come before the file that they are of, so that no kill can lose them.
    assert (left_by(killed, "export") / "parity.json").exists()
    assert not list(left_by(killed, "export").glob("judge-*.gguf"))
    assert not (left_by(killed, "judging") / "metrics.json").exists()


# Several processes.


def write_scores(path: Path, count: int) -> Path:
    """Items of the example without reasonings."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "response", "criteria", "score"])
        for item in example.make_items(count, 11):
            record = item.record
            writer.writerow([record.instruction, record.response, record.rubric.criteria, record.score])
    return path


@pytest.mark.training
def test_data_without_reasonings_make_a_direct_judge_in_one_stage(
    tmp_path: Path, quick_run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    seed_model, run = JudgeSpec.load(quick_run / "merged").base_model, tmp_path / "run"
    data = write_scores(tmp_path / "scores.csv", 24)
    two_stage.main(
        ["--preset", "quick", "--data", str(data), "--seed-model", seed_model, "--out", str(run), "--epochs", "1"]
        + ["--max-new-tokens", "16", "--template", str(quick_run / "example" / "template.jinja")]
    )
    assert "method: direct, 0 of 18 training items have a reasoning: one stage" in (run / "log.txt").read_text()
    for of_the_method in ("stage*", "*reasonings*", "self_generated*"):
        assert not list(run.glob(of_the_method))
    metrics = read_json(run / "metrics.json")
    assert metrics["counts"]["direct"]["direct"] == metrics["counts"]["direct"]["examples"] == 18
    judge = "judge-q8_0.gguf, RAIL"
    compared = {"always the training mean", "untrained seed model, direct, RAIL", "untrained seed model, CoT-RAIL"}
    assert metrics["rows"][judge]["better_by"].keys() == compared
    assert metrics["rows"][judge]["rmse"] == pytest.approx(metrics["rows"]["direct, RAIL"]["rmse"], abs=0.02)
    capsys.readouterr()
    # Nobody has to know that this judge was taught no reasonings.
    assert judge_main(["judge", str(run / "judge-q8_0.gguf"), str(data), "-o", str(tmp_path / "out.jsonl")]) == 0
    rows = read_rows(tmp_path / "out.jsonl")
    assert len(rows) == 24 and not any(row["feedback"] or row["error"] for row in rows)
    assert "never learnt" not in capsys.readouterr().err


@pytest.mark.training
def test_scores_without_reasonings_are_enough_for_two_processes(tmp_path: Path, quick_run: Path) -> None:
    seed_model = JudgeSpec.load(quick_run / "merged").base_model
    data = write_scores(tmp_path / "scores.csv", 24)
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    network = "--mixed_precision no --dynamo_backend no --main_process_port 0"
    recipe = f"--preset quick --method tract --epochs 2 --template {quick_run / 'example' / 'template.jinja'}"
    done = subprocess.run(
        [sys.executable, *launch.split(), *network.split(), two_stage.__file__, *recipe.split()]
        + ["--max-new-tokens", "96"]
        + ["--data", str(data), "--seed-model", seed_model, "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = read_json(tmp_path / "run" / "metrics.json")["counts"]
    written = counts["seed_reasonings"]
    assert written["kept"] + sum(written["rejected"].values()) == counts["training_records"] == 18
    for stage in ("stage1", "stage2"):
        # One step of all processes together counts 8 sequences.
        assert counts[stage]["kept_step"] == 2 * math.ceil(counts[stage]["examples"] / 8)
    names = [row["id"] for row in read_rows(tmp_path / "run" / "seed_reasonings.jsonl")]
    assert len(names) == len(set(names)) == written["kept"]
    assert (tmp_path / "run" / "judge-q8_0.gguf").exists()
    assert len(re.findall("^[-0-9: ]{20}run folder: ", (tmp_path / "run" / "log.txt").read_text(), re.MULTILINE)) == 1
