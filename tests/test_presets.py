"""What a run takes: the preset of the machine, and what its user chose in place of it."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from tract_lite import (
    Preset,
    Record,
    RunOptions,
    Sampling,
    ScoreScale,
    TrainSettings,
    parse_options,
    preset_for,
    settings_of,
)
from tract_lite.options import METHODS, PRESET_NAMES, StageOptions
from tract_lite.presets import LAPTOP, MOST_EPOCHS, PRESETS, SMALL, TOY
from tract_lite.spec import DEFAULT_TEMPLATE


def preset_of(command: str) -> Preset:
    return preset_for(parse_options(command.split()))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_without_choices_is_taken_as_it_stands(name: str) -> None:
    options = parse_options(["--preset", name])
    assert preset_for(options) == PRESETS[name]
    assert options.out == f"runs/{name}"


def test_what_is_chosen_goes_before_the_preset() -> None:
    command = "--preset t4 --data my.csv --held-out own.csv --seed-model a/b --scale 0-10 --max-items 7 --epochs 3"
    command += " --direct-share 0.3"
    command += " --max-length 99 --max-new-tokens 9 --precision float32 --quantization f16 q8_0 --base 16bit --skip-bad"
    preset = preset_of(command)
    assert (preset.data, preset.held_out, preset.seed_model) == ("my.csv", "own.csv", "a/b")
    assert preset.scale == ScoreScale.integers(0, 10)
    assert (preset.max_items, preset.max_length, preset.max_new_tokens) == (7, 99, 9)
    assert (preset.precision, preset.base, preset.skip_bad) == ("float32", "16bit", True)
    assert preset.quantization == ("f16", "q8_0")
    training = TrainSettings(epochs=3.0, direct_share=0.3, save_every=PRESETS["t4"].training.save_every)
    assert preset.training == training


def test_empty_fields_of_a_notebooks_form_are_left_to_the_preset() -> None:
    options = parse_options(["--preset", "quick", "--data", "", "--seed-model", "", "--max-items", "0"])
    options = replace(options, direct_share=0)
    assert preset_for(options) == PRESETS["quick"]
    assert settings_of(options) == settings_of(parse_options(["--preset", "quick"]))


def test_a_toy_preset_on_ones_own_data_has_room_for_real_texts() -> None:
    own = preset_of("--preset quick --data my.csv")
    assert own.max_length > PRESETS["quick"].max_length and own.seed_model == TOY
    assert own.training.batch_size % own.training.micro_batch_size == 0
    assert preset_of("--preset quick --data my.csv --max-length 77").max_length == 77
    # The data of a single stage are always one's own.
    assert preset_for(StageOptions(preset="quick")).max_length == own.max_length
    assert preset_of("--preset t4 --data my.csv").max_length == PRESETS["t4"].max_length


def test_a_real_seed_model_never_gets_the_learning_rate_of_a_toy() -> None:
    for flags in ("--data my.csv", ""):
        rates = {
            seed: preset_of(f"--preset quick {flags} --seed-model {seed}").training for seed in (TOY, SMALL, "a/b")
        }
        assert rates[TOY].learning_rate == PRESETS["demo"].training.learning_rate
        assert rates[SMALL] == rates["a/b"] == PRESETS[LAPTOP].training


@pytest.mark.parametrize("preset", PRESETS)
def test_a_kind_of_seed_model_gets_its_own_settings_on_any_machine(preset: str) -> None:
    toy = preset_of(f"--preset {preset} --data my.csv --seed-model toy")
    assert toy.training.learning_rate == PRESETS["demo"].training.learning_rate and toy.seen is None
    assert preset_of(f"--preset {preset} --seed-model toy").data is None
    small = preset_of(f"--preset {preset} --data my.csv --seed-model small")
    assert (small.training, small.seen, small.data) == (PRESETS[LAPTOP].training, PRESETS[LAPTOP].seen, "my.csv")


def test_a_share_of_direct_sequences_that_was_asked_for_is_kept() -> None:
    bare = [Record(response="r", score=1.0)] * 40
    asked = preset_of("--preset t4 --direct-share 0.3").taught_by(bare)
    assert (asked.method, asked.training.direct_share) == ("tract", 0.3)
    assert preset_of("--preset t4 --method direct --direct-share 1").taught_by(bare).method == "direct"


def test_where_the_number_of_items_decides_the_epochs_the_settings_name_none() -> None:
    chosen = [settings_of(parse_options(["--preset", "laptop", *more])) for more in ([], ["--epochs", "3"])]
    assert [settings["epochs"] for settings in chosen] == [None, 3.0]


def test_every_setting_of_the_training_that_has_an_option_is_taken() -> None:
    chosen = {"epochs": 3.0, "batch_size": 12, "micro_batch_size": 6, "learning_rate": 1e-4, "warmup_ratio": 0.2}
    chosen |= {"raft_weight": 0.0, "max_steps": 9, "save_every": 4, "direct_share": 0.5, "target": "soft"}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
    training = preset_of(f"--preset laptop --data my.csv {flags} --training-seed 0").training
    assert training == TrainSettings(**chosen, seed=0)


@pytest.mark.parametrize("reasoned, method", [(40, "tract"), (20, "tract"), (19, "direct"), (0, "direct")])
def test_data_without_reasonings_are_learnt_in_one_stage(
    caplog: pytest.LogCaptureFixture, reasoned: int, method: str
) -> None:
    caplog.set_level("INFO")
    records = [Record(response="r", score=1.0, feedback="f" if n < reasoned else None) for n in range(40)]
    taught = preset_of("--preset t4").taught_by(records)
    assert (taught.method, taught.training.direct_share) == (method, float(method == "direct"))
    assert f"method: {method}, {reasoned} of 40 training items have a reasoning: " in caplog.text
    for asked in METHODS:
        assert preset_of(f"--preset t4 --method {asked}").taught_by(records).method == asked


@pytest.mark.parametrize("count, epochs", [(900, 3), (5000, 1), (20, MOST_EPOCHS)])
def test_a_small_seed_model_has_epochs_by_the_number_of_items_unless_asked(count: int, epochs: float) -> None:
    records = [Record(response="r", score=1.0)] * count
    assert preset_of("--preset laptop --data my.csv").taught_by(records).training.epochs == epochs
    assert preset_of("--preset laptop --data my.csv --epochs 2.5").taught_by(records).training.epochs == 2.5


def test_the_names_of_the_presets_are_those_of_the_option() -> None:
    assert tuple(PRESETS) == PRESET_NAMES


def test_the_seed_model_is_asked_by_the_template_of_a_file(tmp_path: Path) -> None:
    assert PRESETS["quick"].seed["template"] == DEFAULT_TEMPLATE
    (tmp_path / "mine.jinja").write_text("{{ response }}")
    seed = preset_of(f"--preset quick --template {tmp_path / 'mine.jinja'} --max-new-tokens 5").seed
    assert seed["template"] == "{{ response }}" and seed["sampling"] == Sampling(max_new_tokens=5)


def test_a_scale_that_can_not_be_read_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_options(["--preset", "quick", "--scale", "five"])
    assert stopped.value.code == 2
    assert "--scale: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "gigabytes, flags, name",
    [
        (None, "", "quick"),
        (None, "--data my.csv", "laptop"),
        (None, "--data my.csv --seed-model a/b", "laptop"),
        (None, "--data my.csv --seed-model toy", "quick"),
        (16, "", "t4"),
        (24, "--data my.csv", "24gb"),
        (80, "", "24gb"),
    ],
)
def test_a_machine_gets_the_preset_of_its_memory_and_of_the_data(
    monkeypatch: pytest.MonkeyPatch, gigabytes: int | None, flags: str, name: str
) -> None:
    class Card:
        total_memory = 0.95 * 1e9 * (gigabytes or 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gigabytes is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    options = parse_options(flags.split())
    assert (options.preset, options.out) == (name, f"runs/{name}")


def test_settings_tell_files_by_their_content_and_not_by_where_they_lie(tmp_path: Path) -> None:
    def settings(folder: Path, data: str) -> dict[str, Any]:
        files = [f"--data {data}", f"--held-out {data}", "--template t.jinja", "--seed-model model"]
        flags = [(flag, str(folder / name)) for flag, name in map(str.split, files)]
        return settings_of(parse_options(["--preset", "quick", *chain.from_iterable(flags)]))

    folder = tmp_path / "here"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "t.jinja").write_text("{{ response }}")
    (folder / "scores.csv").write_text("response,score\na,1\n")
    first = settings(folder, "scores.csv")
    hashed = {name for name in first if name.endswith("_sha256") and first[name]}
    assert hashed == {f"{name}_sha256" for name in ("data", "held_out", "template", "seed_model")}
    moved = folder.rename(tmp_path / "dort, wo Öfen sind")
    (moved / "scores.csv").rename(moved / "Noten.csv")
    again = settings(moved, "Noten.csv")
    assert all(first[name] == again[name] for name in hashed)
    (moved / "Noten.csv").write_text("response,score\na,2\n")
    (moved / "model" / "config.json").write_text('{"a": 1}')
    other = settings(moved, "Noten.csv")
    assert {name for name in hashed if first[name] != other[name]} == hashed - {"template_sha256"}


def test_settings_hold_every_choice_that_changes_a_run_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ response }}")
    chosen = "--max-items 8 --epochs 3 --scale 1-7 --base 16bit --precision bfloat16 --template"
    plain = settings_of(parse_options(["--preset", "quick"]))
    other = settings_of(parse_options(["--preset", "quick", *chosen.split(), str(tmp_path / "t.jinja")]))
    changed = {name for name in plain if plain[name] != other[name]}
    assert changed == {"max_items", "epochs", "scale", "base", "template", "template_sha256", "precision"}
    assert (plain["scale"], other["scale"]) == ("1-5", "1-7")
    json.dumps(plain)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"{{ response }}\n{% if %}", r"t\.jinja, line 2: "),
        (b"{{ response | shouted }}", r"t\.jinja, line 1: No filter named 'shouted'"),
        ("Stärke".encode("latin-1"), r"t\.jinja is not in UTF-8"),
        (b"{{ instruction }}", r"t\.jinja never asks for \{\{ response \}\}, the text to judge"),
        (b"", r"t\.jinja never asks for"),
        (None, r"t\.jinja can't be read: No such file"),
    ],
)
def test_a_template_that_can_not_be_used_is_told_before_anything_starts(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "t.jinja"
    if content is not None:
        file.write_bytes(content)
    options = parse_options(["--preset", "quick", "--template", str(file)])
    for use in (lambda: settings_of(options), lambda: preset_for(options).seed):
        with pytest.raises(ValueError, match=words):
            use()


def test_a_scratch_folder_that_is_a_file_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--scratch .*file is a file: name a folder"):
        parse_options(["--preset", "quick", "--scratch", str(tmp_path / "file")])


def test_a_run_whose_judge_never_reasons_is_told_to_be_a_single_stage() -> None:
    with pytest.raises(ValueError, match="no reasonings for a second stage\n--method direct trains one stage"):
        preset_for(RunOptions(preset="quick", direct_share=1))
    assert preset_for(StageOptions(preset="quick", direct_share=1)).training.direct_share == 1


def test_types_have_one_spelling_since_they_stand_in_the_names_of_files() -> None:
    assert preset_of("--preset quick --quantization Q8_0 q4_K_M").quantization == ("q8_0", "q4_k_m")


def test_settings_leave_out_where_a_run_lies_and_how_far_it_goes() -> None:
    options = ["--preset", "quick", "--out", "here", "--scratch", "there", "--train-only"]
    assert settings_of(parse_options(options)) == settings_of(parse_options(["--preset", "quick"]))


def test_every_option_is_a_field_of_the_preset_or_of_the_call() -> None:
    of_call = {"preset", "out", "scratch", "train_only", "training_seed"}
    known = {item.name for kind in (Preset, TrainSettings) for item in fields(kind)}
    assert {item.name for item in fields(RunOptions)} - of_call <= known
