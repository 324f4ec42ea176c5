"""Unsloth's path in an environment of its own, on a processor: the same as that of transformers.

Its kernels, its compiled code and its memory are the GPU's affair: `benchmarks/gpu_check.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from safetensors.torch import load_file
from stages import make_records
from tiny import make_family, vocabulary_folder
from unsloth_on_cpu import FAMILIES

from tract_lite.data.jsonl import read_json
from tract_lite.data.records import write_records

SCRIPT = Path(__file__).with_name("unsloth_on_cpu.py")
# The month that pyproject.toml allows, and what it was tried with. Of Unsloth's own requirements
# only those that are imported: torchvision, xformers, diffusers and torchao are not.
PINNED = """transformers==5.17.0 datasets==4.8.5 peft==0.21.2 accelerate==1.15.0 bitsandbytes==0.50.2 trl==1.15.0
scipy lazy_loader pillow tyro typer structlog msgspec json5 nest-asyncio hf_transfer""".split()
ALONE = "unsloth==2026.10.9 unsloth_zoo==2026.10.9 triton==3.9.0 cut_cross_entropy".split()
# A window that is shorter than the sequences.
OPTIONS: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 16}}
LOGGED = ("loss", "ce", "raft", "score_mae", "eval_rmse", "eval_pearson")

pytestmark = [pytest.mark.long, pytest.mark.skipif(sys.platform != "linux", reason="Triton is there under Linux alone")]


@pytest.fixture(scope="session")
def environment(shared_once: Callable[..., Path]) -> Path:
    def make(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # torch first and by its version, so that it is the one for this machine.
        for asked in (["torch==2.13.0"], PINNED, ["--no-deps", *ALONE]):
            subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", *asked], check=True)

    return shared_once("unsloth_environment", make)


def start(environment: Path, backend: str, way: str, seed_model: Path, out: Path) -> subprocess.Popen:
    data = out.parent / f"{out.name}.jsonl"
    write_records(data, make_records(16))
    command = [environment / "bin" / "python", SCRIPT, backend, way, seed_model, data, out]
    alone = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)),
        cwd=out.parent,
        env={**os.environ, **alone},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def figures_of(process: subprocess.Popen, out: Path) -> dict[str, Any]:
    said, _ = process.communicate()
    assert process.returncode == 0, said[-5000:]
    return read_json(out / "figures.json")


@dataclass
class Way:
    """What a backend has left and said."""

    folder: Path
    figures: dict[str, Any]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def logged(self, name: str, log: str = "log") -> list[float]:
        return [entry[name] for entry in self.figures[log] if name in entry]


@pytest.fixture(scope="session")
def seeds(shared_once: Callable[..., Path]) -> Path:
    def make(folder: Path) -> None:
        for family in FAMILIES:
            make_family(folder / family, vocabulary_folder("split digits"), family, **OPTIONS.get(family, {}))

    return shared_once("seeds_of_unsloth", make)


@pytest.fixture(scope="session", params=FAMILIES)
def both(request, environment: Path, seeds: Path, shared_once: Callable[..., Path]) -> tuple[Way, Way]:
    """One family's whole way by Unsloth and by transformers, each in a process of its own."""

    def make(folder: Path) -> None:
        places = [folder / backend for backend in ("unsloth", "transformers")]
        running = [start(environment, place.name, "whole", seeds / request.param, place) for place in places]
        for process, place in zip(running, places):
            figures_of(process, place)

    folder = shared_once(f"unsloth_{request.param}", make)
    unsloth, transformers = (
        Way(folder / name, read_json(folder / name / "figures.json")) for name in ("unsloth", "transformers")
    )
    return unsloth, transformers


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert (ours[name] - weight).norm() <= tolerance * weight.norm(), name


def test_loss_and_gradients_are_those_of_transformers(both: tuple[Way, Way]) -> None:
    ours, theirs = both
    assert ours.figures["by_unsloth"] and not theirs.figures["by_unsloth"]
    assert ours.figures["loss"] == pytest.approx(theirs.figures["loss"], rel=1e-5)
    gradients = theirs.weights("gradients")
    assert len(gradients) > 8 and all(gradient.any() for gradient in gradients.values())
    assert_same(ours.weights("gradients"), gradients, 1e-4)


def test_a_stage_with_validation_ends_in_the_same_adapter(both: tuple[Way, Way]) -> None:
    ours, theirs = both
    for name in LOGGED:
        assert len(theirs.logged(name)) == (3 if name.startswith("eval") else 6)
        assert ours.logged(name) == pytest.approx(theirs.logged(name), rel=1e-3), name
    assert ours.logged("loss")[-1] < ours.logged("loss")[0]
    assert ours.figures["kept_step"] == theirs.figures["kept_step"]
    assert_same(ours.weights("whole/trained"), theirs.weights("whole/trained"), 1e-3)


def test_a_stopped_stage_goes_on_to_the_same_adapter(both: tuple[Way, Way]) -> None:
    ours, _ = both
    assert ours.figures["resumed_from"] == 4
    for name in LOGGED:
        assert ours.logged(name, "resumed_log") == pytest.approx(ours.logged(name), rel=1e-5), name
    assert_same(ours.weights("resumed/trained"), ours.weights("whole/trained"), 1e-6)


def test_scores_and_reasonings_are_those_of_transformers_also_of_an_adapter_loaded_anew(both: tuple[Way, Way]) -> None:
    ours, theirs = (way.figures for way in both)
    assert len(set(theirs["trained"])) > 1
    for name in ("trained", "loaded"):
        assert ours[name] == pytest.approx(theirs["trained"], abs=1e-4), name
        assert ours[f"{name}_writes"] == theirs["trained_writes"], name


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_seed_in_4_bits_passes_and_has_nearly_the_loss_of_transformers(
    environment: Path, seeds: Path, tmp_path: Path, family: str
) -> None:
    places = [tmp_path / backend for backend in ("unsloth", "transformers")]
    running = [start(environment, place.name, "4 bits", seeds / family, place) for place in places]
    ours, theirs = (figures_of(process, place) for process, place in zip(running, places))
    assert ours["kinds"] == theirs["kinds"] == ["Linear4bit"] and ours["steps"] == 1
    # bfloat16 is rounded at other places.
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.06)


def test_what_unsloth_would_do_without_a_word_is_refused(environment: Path, seeds: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = figures_of(start(environment, "unsloth", "refusals", seeds / "llama", out), out)
    assert said["batch"].startswith("a sequence has 129 tokens, and the model was loaded for 128\n")
    for name, longest, asked in (("stage", 128, 129), ("positions", 512, 513)):
        assert said[name].startswith(f"the seed model reads {longest} tokens of a sequence, and {asked} are asked for")
    assert "has loaded without them\n" in said["4 bits"]
    assert all(len(text.splitlines()) == 2 for text in said.values())
