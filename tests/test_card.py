"""The card says what a run recorded, and what it did not record stays unknown."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tract_lite import JudgeSpec, Record, ScoreScale, evaluate, write_model_card, write_records
from tract_lite.data.jsonl import write_rows

SEED, DATA = "someone/Seed-7B-bnb-4bit", "someone/Judged-Texts"
SPEC = JudgeSpec(
    template="{{ response }}",
    scale=ScoreScale(("poor", "2"), (0.5, 2)),
    chat=("{prompt}",),
    marker_ids=(1,),
    label_ids=((2,), (3,)),
    pieces=("a", "b", "c"),
    eos_id=0,
    base_model=SEED,
)
STAGE = {
    "records": 1200,
    "examples": 1190,
    "dropped": {"too long": 10},
    "validation": 40,
    "kept_step": 75,
    "learning_rate": 2e-4,
    "settings": {"epochs": 2.0, "learning_rate": None},
    "log": [],
}


def make_run(folder: Path, base_model: str = SEED, **files: Any) -> Path:
    """A run folder with a trained stage 2 and JSON files of these names."""
    adapter = folder / "stage2" / "adapter"
    adapter.mkdir(parents=True)
    data = json.loads(SPEC.to_json()) | {"base_model": base_model}
    JudgeSpec.from_json(json.dumps(data)).save(adapter)
    (folder / "stage2" / "stage.json").write_text(json.dumps(STAGE))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def header_of(card: Path) -> dict[str, Any]:
    _, header, _ = card.read_text().split("---\n", 2)
    return yaml.safe_load(header)


def section(card: Path, title: str) -> str:
    return card.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_a_hub_reads_the_header_and_misses_the_licence(tmp_path: Path) -> None:
    run = make_run(tmp_path, settings={"data": DATA})
    assert header_of(write_model_card(run)) == {
        "license": None,
        "base_model": SEED,
        "datasets": [DATA],
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["tract-lite", "llm-as-a-judge"],
    }


def test_the_metrics_come_with_their_item_counts_and_intervals(tmp_path: Path) -> None:
    figures = evaluate([1.1, 2.2, None, 3.0], [1, 2, 3, 3])
    constant = evaluate([2.0, 2.0], [1, 2])
    parity = {"records": 4, "different_prompts": 0, "mean_difference": 0.0123, "largest_difference": 0.0456}
    metrics = {"rows": {"CoT-RAIL": figures, "constant": constant}, "parity": {"j.gguf": parity}}
    run = make_run(tmp_path, metrics=metrics)
    # Cells are padded, for those who read the card as text.
    shown = re.sub(" +", " ", section(write_model_card(run), "Metrics"))
    low, high = figures["intervals"]["rmse"]
    assert f"| {figures['rmse']:.3f} [{low:.3f}, {high:.3f}] |" in shown
    assert "| CoT-RAIL | 3 |" in shown and "| 0.750 |" in shown
    assert math.isnan(constant["pearson"]) and "| constant | 2 | undefined |" in shown
    assert "scores of 4 items differ by 0.0123 on average, 0.0456 at most" in shown


def test_data_and_settings_are_those_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, settings={"data": DATA, "preset": "t4"}, counts={"bad_rows": 1240})
    records = [Record(response=str(n), score=1.0, feedback="Good.", id=str(n)) for n in range(7)]
    write_records(run / "training.jsonl", records)
    write_records(run / "self_generated.jsonl", records[:5])
    write_rows(run / "self_generated.rejected.jsonl", [{"reason": "empty"}, {"reason": "too long"}])
    card = write_model_card(run)
    data, settings = section(card, "Data"), section(card, "Settings")
    assert f"- source: {DATA}\n- bad rows: 1,240\n- training records: 7\n" in data
    assert "held out" not in data
    assert "- self generated: 5 kept, 2 rejected\n" in data
    assert "- stage 2: 1,190 sequences trained on, 10 dropped, 40 for validation" in data
    assert "- preset: t4\n" in settings
    assert "- stage 2: epochs 2.0, learning_rate 0.0002, kept step 75\n" in settings
    assert "poor = 0.5, 2. Trained from" in card.read_text()


def test_what_was_not_recorded_is_said_to_be_unknown(tmp_path: Path) -> None:
    card = write_model_card(make_run(tmp_path, base_model=""))
    assert "base_model" not in header_of(card) and "datasets" not in header_of(card)
    assert "Trained from unknown" in card.read_text()
    assert section(card, "Data").startswith("\n- source: unknown\n")
    assert section(card, "Metrics").strip() == "None were recorded."


def test_the_built_in_example_is_no_data_set_of_somebody(tmp_path: Path) -> None:
    card = write_model_card(make_run(tmp_path, settings={"data": None}))
    assert "- source: the built-in example" in section(card, "Data")
    assert "a judge for trying things out" in section(card, "Limits")


@pytest.mark.parametrize("data, is_hub", [("someone/judged-texts", True), ("data/my.csv", False)])
def test_a_file_that_is_gone_is_no_data_set_of_the_hub(tmp_path: Path, data: str, is_hub: bool) -> None:
    card = write_model_card(make_run(tmp_path, settings={"data": data}))
    assert ("datasets" in header_of(card)) == is_hub
    assert f"- source: {data if is_hub else 'my.csv'}\n" in section(card, "Data")


def test_paths_of_the_machine_stay_there(tmp_path: Path) -> None:
    seed = tmp_path / "private" / "seed"
    seed.mkdir(parents=True)
    run = make_run(tmp_path / "run", str(seed), settings={"data": "/home/me/scores.csv"})
    text = write_model_card(run).read_text()
    assert "private" not in text and "/home" not in text
    assert "Trained from seed " in text and "- source: scores.csv\n" in text


def test_a_merged_folder_gets_the_card_in_place_of_its_seeds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    merged = run / "merged"
    merged.mkdir()
    (merged / "config.json").write_text("{}")
    (merged / "README.md").write_text("the seed's own card")
    card = write_model_card(run, merged)
    assert card == merged / "README.md" and "the seed's own card" not in card.read_text()
    assert header_of(card)["library_name"] == "transformers"
    assert 'Judge.from_pretrained(".")' in section(card, "Use")


def test_the_card_beside_gguf_files_names_them(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "adapter.gguf").touch()
    alone = section(write_model_card(run), "Use")
    assert 'Judge.from_gguf("seed.gguf", adapter="adapter.gguf")' in alone
    (run / "judge-q8_0.gguf").touch()
    card = write_model_card(run)
    assert "Files: `adapter.gguf`, `judge-q8_0.gguf`." in card.read_text()
    assert 'Judge.from_gguf("judge-q8_0.gguf")' in section(card, "Use")


def test_the_licences_are_left_to_fill_in(tmp_path: Path) -> None:
    fields = section(write_model_card(make_run(tmp_path)), "Licence").strip().splitlines()
    assert len(fields) == 4 and all(field.endswith(": *fill in*") for field in fields)


def test_a_folder_without_a_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no judge_spec.json"):
        write_model_card(tmp_path)


def test_the_card_of_a_judge_without_reasonings_speaks_of_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics={"rows": {"judge": evaluate([1.1, 2.2, 3.0], [1, 2, 3])}})
    reasoned = write_model_card(run).read_text()
    replace(SPEC, method={"direct_share": 1.0}).save(run / "stage2" / "adapter")
    direct = write_model_card(run).read_text()
    assert "it writes a reasoning, then its score" in reasoned and "Reasonings are sampled" in reasoned
    assert "without a reasoning its score is the expectation" in direct and "on scores alone, in one stage" in direct
    assert "Reasonings are sampled" not in direct and "one reasoning per item" not in direct


def test_the_one_stage_of_a_direct_run_is_called_that(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "stage2").rename(run / "direct")
    card = write_model_card(run).read_text()
    assert "- the one stage: 1,190 sequences" in card and "stage t" not in card


@pytest.mark.parametrize("seed_model, toy", [(None, True), ("toy", True), ("someone/Model", False)])
def test_a_toy_is_called_one(tmp_path: Path, seed_model: str | None, toy: bool) -> None:
    run = make_run(tmp_path / "run", settings={"seed_model": seed_model, "data": "mine.csv"})
    assert ("Its seed model is a toy" in write_model_card(run).read_text()) == toy
