"""The recipe from end to end, at its demo size and on a slice of real data."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import demo_task
import pytest
import two_stage
from held_out import HeldOut
from tiny import SHARED, load_tokenizer, make_it_stop, make_llama

from tract_lite import Judge, JudgeSpec, read_records


def rows_of(run: Path) -> dict[str, dict]:
    return json.loads((run / "metrics.json").read_text())["rows"]


def test_the_example_is_the_same_for_the_same_seed_number() -> None:
    assert demo_task.make_items(5, 7) == demo_task.make_items(5, 7)
    assert demo_task.make_items(5, 7) != demo_task.make_items(5, 8)


def test_gold_scores_of_the_example_are_drawn_around_the_stated_mean() -> None:
    items = demo_task.make_items(20_000, 5)
    errors = [item.record.score - item.mean for item in items]
    vague_tips = demo_task.TIPS * demo_task.SHARES["vague"]
    variance = demo_task.CHANCE * (1 - demo_task.CHANCE) * vague_tips
    assert abs(sum(errors) / len(errors)) < 4 * math.sqrt(variance / len(errors))
    assert math.isclose(sum(e * e for e in errors) / len(errors), variance, rel_tol=0.05)


def test_the_demo_judge_comes_near_the_best_possible_one(demo_run: Path) -> None:
    rows = rows_of(demo_run)
    best = rows["true mean (best possible)"]["rmse"]
    judge, most_likely = (rows[f"judge-f16.gguf, {reading}"] for reading in ("CoT-RAIL", "most likely label"))
    assert judge["count"] >= 1000
    assert judge["rmse"] <= 1.15 * best
    assert judge["rmse"] <= 0.95 * most_likely["rmse"]
    assert rows["stage 2, CoT-RAIL"]["rmse"] < rows["stage 1, CoT-RAIL"]["rmse"]


@pytest.mark.parametrize("name, mean, largest", [("f16", 0.01, 0.05), ("q8_0", 0.05, 0.5)])
def test_the_demo_judge_is_the_same_in_gguf_and_in_transformers(
    demo_run: Path, name: str, mean: float, largest: float
) -> None:
    parity = json.loads((demo_run / "metrics.json").read_text())["parity"][f"judge-{name}.gguf"]
    assert parity["different_prompts"] == 0 and parity["records"] >= 1000
    assert parity["mean_difference"] <= mean
    assert parity["largest_difference"] <= largest


def test_a_run_folder_holds_what_a_user_looks_for(demo_run: Path) -> None:
    for name in (
        "settings.json",
        "log.txt",
        "counts.json",
        "metrics.json",
        "report.md",
        "README.md",
        "merged/README.md",
        "adapter.gguf",
        "judged/stage1.jsonl",
        "judged/judge-q8_0.jsonl",
        "self_generated.jsonl",
        "judge-f16.gguf",
        "judge-q8_0.gguf",
        "stage1/adapter/adapter_model.safetensors",
        "merged/config.json",
    ):
        assert (demo_run / name).exists(), name
    assert JudgeSpec.load(demo_run / "merged").base_model


def test_each_stage_of_the_demo_keeps_its_best_validated_adapter(demo_run: Path) -> None:
    for name in ("stage1", "stage2"):
        stage = json.loads((demo_run / name / "stage.json").read_text())
        rmse = {entry["step"]: entry["eval_rmse"] for entry in stage["log"] if "eval_rmse" in entry}
        assert len(rmse) > 2 and stage["validation"] > 50
        assert rmse[stage["kept_step"]] == min(rmse.values())


def test_a_second_call_does_nothing_twice(demo_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo_run.rglob("*.safetensors")}
    two_stage.main(["--preset", "demo", "--out", str(demo_run)])
    assert before == {path: path.stat().st_mtime_ns for path in demo_run.rglob("*.safetensors")}


def test_held_out_items_that_a_lost_session_has_judged_are_not_judged_again(demo_run: Path, tmp_path: Path) -> None:
    items = HeldOut(read_records(demo_run / "held_out.jsonl"), tmp_path / "judged")
    file = tmp_path / "judged" / "some.jsonl"
    before = items.judge("some", lambda: Judge.from_gguf(demo_run / "judge-f16.gguf"), count=8)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:5]) + lines[5][:30])
    again = items.judge("some", lambda: Judge.from_gguf(demo_run / "judge-f16.gguf"), count=8)
    assert file.read_bytes().splitlines(keepends=True)[:5] == lines[:5]
    assert [j.id for j in again] == [j.id for j in before] == [r.id for r in items.records[:8]]
    assert again[:5] == before[:5]
    assert items.judge("some", lambda: pytest.fail("the judge was opened"), count=8) == again


def test_a_run_folder_of_other_settings_is_refused(demo_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        two_stage.main(["--preset", "demo", "--epochs", "3", "--out", str(demo_run)])
    assert stopped.value.code == 2
    assert "epochs: None there, 3.0 now" in caplog.text


def test_a_run_folder_of_other_data_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "scores.csv"
    options = two_stage.parse(["--data", str(data), "--preset", "quick", "--out", str(tmp_path)])
    settings = []
    for text in ("response,score\na,1\n", "response,score\na,2\n"):
        data.write_text(text)
        settings.append(two_stage.TwoStage(options)._settings())
    folder = two_stage.RunFolder(tmp_path, writes=True)
    folder.open(settings[0])
    folder.keep_settings()
    folder.open(settings[0])
    with pytest.raises(ValueError, match="other settings .data_sha256: .* there, .* now"):
        folder.open(settings[1])


def test_real_benchmark_data_goes_the_whole_way(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("qwen2")
    rows = json.loads((SHARED / "data" / "vicuna_eval.json").read_text())[:8]
    (tmp_path / "slice.json").write_text(json.dumps(rows))
    seed = make_llama(tmp_path / "seed", SHARED / "tokenizers" / "qwen2", context=4096)
    make_it_stop(seed, tokenizer.eos_token_id)
    two_stage.main(
        [
            "--preset",
            "demo",
            "--data",
            str(tmp_path / "slice.json"),
            "--seed-model",
            str(seed),
            "--out",
            str(tmp_path / "run"),
            "--quantization",
            "f16",
        ]
    )
    counts = json.loads((tmp_path / "run" / "counts.json").read_text())
    assert counts["items"] == 8 and counts["pairs"] == 24 and counts["bad_rows"] == 0
    assert counts["training_records"] + counts["held_out_pairs"] == 24
    stage = counts["stage1"]
    assert stage["records"] == stage["examples"] == counts["training_records"]
    assert stage["dropped"] == {} and stage["validation"] == 0
    reasonings = counts["self_generated"]
    assert reasonings["kept"] + sum(reasonings["rejected"].values()) == counts["training_records"]
    assert counts["stage2"]["examples"] == reasonings["kept"] > 0
    assert (tmp_path / "run" / "judge-f16.gguf").exists()


def test_scores_without_reasonings_are_enough_for_two_processes(tmp_path: Path, demo_run: Path) -> None:
    seed = json.loads((demo_run / "merged" / "judge_spec.json").read_text())["base_model"]
    data = tmp_path / "scores.csv"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "response", "criteria", "score"])
        for item in demo_task.make_items(60, 11):
            record = item.record
            writer.writerow([record.instruction, record.response, record.rubric.criteria, record.score])
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    network = "--mixed_precision no --dynamo_backend no --main_process_port 0"
    recipe = "--preset demo --quantization q8_0 --max-new-tokens 128"
    done = subprocess.run(
        [sys.executable, *launch.split(), *network.split()]
        + [two_stage.__file__, *recipe.split()]
        + ["--data", str(data), "--seed-model", seed, "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads((tmp_path / "run" / "counts.json").read_text())
    written = counts["seed_reasonings"]
    assert written["kept"] + sum(written["rejected"].values()) == counts["training_records"]
    for stage in ("stage1", "stage2"):
        # One step of all processes together counts 8 sequences.
        steps = 2 * math.ceil(counts[stage]["examples"] / 8)
        assert counts[stage]["kept_step"] == steps
    assert len((tmp_path / "run" / "seed_reasonings.jsonl").read_text().splitlines()) == (written["kept"])
    assert (tmp_path / "run" / "judge-q8_0.gguf").exists()
