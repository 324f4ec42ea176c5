"""The training of a stage: its loss, its steps, its checkpoints, and what it leaves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stages import (
    SAVING,
    SCALE,
    SHORT,
    load,
    make_records,
    python_environment,
    small_seed_model,
    trained_weights,
    weights_in,
)

from tract_lite.judge import Judge
from tract_lite.loss.cot_raft import cot_raft_loss
from tract_lite.metrics import evaluate
from tract_lite.record import Record
from tract_lite.report.words import times_of
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec, Sampling, make_spec
from tract_lite.training import stage
from tract_lite.training.encode import LengthGroupedSampler, collate, encode_records
from tract_lite.training.layers import lm_head_weight
from tract_lite.training.seed_model import add_lora, hidden_states, load_seed, open_seed_model
from tract_lite.training.settings import RESULT_FILE, TrainSettings
from tract_lite.training.stage import newest_complete_checkpoint, train_adapter, train_stage
from tract_lite.training.toy_seed_model import make_toy_seed_model
from tract_lite.training.trainer import COMPLETE_FILE, CotRaftTrainer
from tract_lite.vocabulary import TransformersVocabulary

trains = pytest.mark.training
LOADED: dict[str, Any] = {"load_in_4bit": False, "precision": "float32"}
STAGE: dict[str, Any] = {"scale": SCALE, "settings": SAVING, "max_length": 128, **LOADED}
ONE_STEP = TrainSettings(batch_size=4, micro_batch_size=4, max_steps=1)


@pytest.fixture(scope="module")
def seed_model(shared_once):
    return small_seed_model(shared_once)


@trains
def test_a_stage_lowers_the_loss_and_leaves_an_adapter_with_its_spec(seed_model, tmp_path):
    model, tokenizer, spec = load(seed_model)
    result = train_stage(
        model,
        tokenizer,
        make_records(16),
        spec,
        tmp_path,
        TrainSettings(batch_size=8, micro_batch_size=4, learning_rate=2e-2, max_steps=40, log_every=10),
    )
    log = [entry for entry in result["log"] if "ce" in entry]
    assert log[-1]["ce"] < 0.3 * log[0]["ce"]
    assert log[-1]["score_mae"] < 0.5 * log[0]["score_mae"]
    assert log[-1]["loss"] == pytest.approx(log[-1]["ce"] + log[-1]["raft"], rel=1e-3)
    assert JudgeSpec.load(tmp_path / "adapter") == spec
    assert json.loads((tmp_path / RESULT_FILE).read_text()) == json.loads(json.dumps(result))
    assert result["examples"] == result["records"] == 16 and result["dropped"] == {}


@trains
@pytest.mark.skipif(torch.cuda.is_available(), reason="bfloat16 on the CPU")
def test_a_stage_in_bfloat16_learns_as_well(seed_model, tmp_path):
    model, tokenizer = load_seed(seed_model, False, backend="transformers", precision="bfloat16")
    spec = make_spec(tokenizer, ScoreScale.integers(1, 5), max_length=128)
    settings = TrainSettings(**{**SHORT, "learning_rate": 2e-2, "epochs": 8})
    log = train_stage(add_lora(model), tokenizer, make_records(), spec, tmp_path, settings)["log"]
    losses = [entry["ce"] for entry in log if "ce" in entry]
    assert losses[-1] < 0.6 * losses[0]
    assert {weight.dtype for weight in weights_in(tmp_path / "adapter").values()} == {torch.float32}


# Plain gradient descent shows the scale of a gradient; Adam hides it.
DESCENT = dict(optimizer="sgd", scheduler="constant", warmup_ratio=0, max_grad_norm=0, log_every=1)


@trains
def test_a_step_at_learning_rate_1_ends_in_the_same_weights_however_it_is_split(seed_model, tmp_path):
    results = []
    for size in (8, 4, 2, 1):
        model, tokenizer, spec = load(seed_model)
        before = trained_weights(model)
        settings = TrainSettings(batch_size=8, micro_batch_size=size, learning_rate=1.0, max_steps=1, **DESCENT)
        train_stage(model, tokenizer, make_records(8), spec, tmp_path / str(size), settings)
        weights = trained_weights(model)
        gradient = torch.cat([(before[name] - weights[name]).flatten() for name in weights])
        results.append((weights, gradient))
    (expected, whole), *others = results
    assert whole.abs().max() > 0.1
    for weights, gradient in others:
        assert (gradient - whole).norm() <= 1e-5 * whole.norm()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


@trains
@pytest.mark.parametrize("ce_on_score", [True, False])
def test_the_micro_batch_size_changes_no_weight(seed_model, tmp_path, ce_on_score):
    results = []
    for size in (8, 4, 2, 1):
        model, tokenizer, spec = load(seed_model)
        examples, _ = encode_records(make_records(20), spec, TransformersVocabulary(tokenizer))
        settings = TrainSettings(
            batch_size=8,
            micro_batch_size=size,
            learning_rate=0.05,
            epochs=1,
            raft_weight=2.0,
            ce_on_score=ce_on_score,
            **DESCENT,
        )
        trainer = CotRaftTrainer(model, examples, spec, tokenizer, tmp_path / str(size), settings)
        trainer.train()
        weights = trained_weights(model)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 3  # 8, 8 and 4 sequences
        results.append((weights, losses))
    (expected, expected_losses), *others = results
    moved = max(weight.abs().max() for name, weight in expected.items() if "lora_B" in name)
    assert moved > 1e-2
    for weights, losses in others:
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5 * moved)


@trains
@pytest.mark.parametrize("ce_on_score", [True, False])
def test_the_logged_loss_of_a_step_is_that_of_its_whole_batch(seed_model, tmp_path, ce_on_score):
    model, tokenizer, spec = load(seed_model)
    examples, _ = encode_records(make_records(8), spec, TransformersVocabulary(tokenizer))
    batch = collate(examples, tokenizer.pad_token_id)
    with torch.no_grad():
        expected = cot_raft_loss(
            hidden_states(model, batch["input_ids"], batch["attention_mask"]),
            lm_head_weight(model),
            batch["labels"],
            batch["score_positions"],
            torch.tensor([token for (token,) in spec.label_ids]),
            torch.tensor(spec.scale.values),
            batch["targets"],
            raft_weight=2.0,
            ce_on_score=ce_on_score,
        )
    settings = TrainSettings(
        batch_size=8, micro_batch_size=2, max_steps=1, log_every=1, raft_weight=2.0, ce_on_score=ce_on_score
    )
    log = train_stage(model, tokenizer, make_records(8), spec, tmp_path, settings)["log"][0]
    assert log["loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    assert log["ce"] == pytest.approx(expected.ce.item(), rel=1e-4)
    assert log["raft"] == pytest.approx(expected.raft.item(), rel=1e-4)
    errors = (expected.predictions - batch["targets"]).abs()
    assert log["score_mae"] == pytest.approx(errors.mean().item(), rel=1e-4)


@pytest.mark.parametrize("micro_batch_size", [3, 16])
def test_a_batch_that_is_no_multiple_of_its_micro_batches_is_refused(micro_batch_size):
    with pytest.raises(ValueError, match="multiple"):
        TrainSettings(batch_size=8, micro_batch_size=micro_batch_size)


# Each child is killed at the start of a step; they are forks, so that the imports are made once.
KILL = """
import os, signal, sys
from pathlib import Path
from stages import SAVING, SCALE, make_records
from tract_lite.training.stage import train_adapter
from tract_lite.training.trainer import CotRaftTrainer

def killed_at(step, out):
    compute = CotRaftTrainer.compute_loss
    def compute_or_die(self, *args, **options):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(self, *args, **options)
    CotRaftTrainer.compute_loss = compute_or_die
    train_adapter(make_records(), out, seed_model=sys.argv[1], scale=SCALE, settings=SAVING,
                  validation=make_records(6, seed=1), load_in_4bit=False, precision="float32", max_length=128)

for step in map(int, sys.argv[3:]):
    child = os.fork()
    if not child:
        try:
            killed_at(step, Path(sys.argv[2], str(step)))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""
KILLS = {1: None, 5: 4, 8: 8}


@pytest.fixture(scope="module")
def killed(shared_once, seed_model):
    """Stages that were killed at a step, by its number."""

    def make(out: Path) -> None:
        command = [sys.executable, "-c", KILL, str(seed_model), str(out), *map(str, KILLS)]
        done = subprocess.run(command, env=python_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return shared_once("killed_stages", make)


def train_whole(seed_model: Path, out: Path) -> Path:
    return train_adapter(make_records(), out, seed_model=seed_model, validation=make_records(6, seed=1), **STAGE)


@pytest.fixture(scope="module")
def uninterrupted(shared_once, seed_model):
    return shared_once("stage", lambda out: train_whole(seed_model, out))


@trains
@pytest.mark.parametrize("step, checkpoint", KILLS.items())
def test_a_killed_stage_goes_on_to_the_adapter_of_an_uninterrupted_one(
    seed_model, uninterrupted, killed, tmp_path, step, checkpoint
):
    # A run folder may be moved before it goes on.
    out = shutil.copytree(killed / str(step), tmp_path / "moved")
    assert newest_complete_checkpoint(out) == (str(out / f"checkpoint-{checkpoint}") if checkpoint else None)
    assert not (out / RESULT_FILE).exists()
    # What a run killed while it saves leaves behind.
    half = out / f"checkpoint-{step + 1}"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    if checkpoint:
        # As if the call that was killed had taken long.
        state = out / f"checkpoint-{checkpoint}" / "trainer_state.json"
        content = json.loads(state.read_text())
        content["log_history"][-1]["seconds"] = before = 1000.0
        state.write_text(json.dumps(content))
        sizes = json.loads(state.with_name(COMPLETE_FILE).read_text())
        state.with_name(COMPLETE_FILE).write_text(json.dumps({**sizes, state.name: state.stat().st_size}))
    adapter = train_whole(seed_model, out)
    result, whole = (json.loads((folder / RESULT_FILE).read_text()) for folder in (out, uninterrupted))
    seconds = [entry["seconds"] for entry in result["log"] if not checkpoint or entry["step"] > checkpoint]
    assert seconds == sorted(seconds) and seconds[0] > (before if checkpoint else 0)
    assert times_of({"stage1": result["log"]}) == {"stage 1": seconds[-1]}
    assert result["log"][-1]["step"] == whole["log"][-1]["step"] == 9
    assert result["kept_step"] == whole["kept_step"]
    resumed = weights_in(adapter)
    for name, weight in weights_in(uninterrupted / "adapter").items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)


@trains
def test_a_killed_stage_goes_on_with_a_seed_model_that_was_moved_and_in_smaller_pieces(
    seed_model, uninterrupted, killed, tmp_path
):
    out = shutil.copytree(killed / "5", tmp_path / "stage")
    moved = shutil.copytree(seed_model, tmp_path / "ein anderes Öfchen")
    settings = replace(SAVING, micro_batch_size=1)
    asked = {**STAGE, "settings": settings, "validation": make_records(6, seed=1)}
    adapter = train_adapter(make_records(), out, seed_model=moved, **asked)
    assert JudgeSpec.load(adapter).base_model == str(moved)
    log = json.loads((out / RESULT_FILE).read_text())["log"]
    assert [entry["step"] for entry in log if "ce" in entry] == list(range(1, 10))
    weights = weights_in(adapter)
    for name, weight in weights_in(uninterrupted / "adapter").items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-3)


@trains
@pytest.mark.parametrize("changed", ["config.json", "model.safetensors"])
def test_another_seed_model_at_the_same_place_is_another_stage(seed_model, tmp_path, changed):
    there = shutil.copytree(seed_model, tmp_path / "seed_model")
    asked = {**STAGE, "seed_model": there, "settings": ONE_STEP}
    train_adapter(make_records(4), tmp_path / "stage", **asked)
    content = bytearray((there / changed).read_bytes())
    content[-8] ^= 1
    (there / changed).write_bytes(content)
    with pytest.raises(ValueError, match="seed_model: another content"):
        train_adapter(make_records(4), tmp_path / "stage", **asked)


@trains
def test_a_stage_that_is_there_is_not_trained_again(seed_model, uninterrupted, tmp_path, monkeypatch):
    out = shutil.copytree(uninterrupted, tmp_path / "stage")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(stage, "open_seed_model", lambda *_, **__: pytest.fail("the seed model was loaded"))
    assert train_whole(seed_model, out) == out / "adapter"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@trains
@pytest.mark.parametrize("where", ["uninterrupted", "killed"])
@pytest.mark.parametrize(
    "change, words",
    [
        ({"records": make_records(11)}, "records: another content"),
        ({"records": [replace(make_records()[0], feedback="It is so."), *make_records()[1:]]}, "records: another"),
        ({"validation": ()}, "validation: another content"),
        ({"settings": replace(SAVING, raft_weight=2.0)}, "raft_weight: 1.0 there, 2.0 now"),
        ({"scale": ScoreScale.integers(1, 4)}, "scale: 1-5 there, 1-4 now"),
        ({"seed_model": "other"}, "seed_model: "),
        ({"max_length": 64}, "max_length: 128 there, 64 now"),
        ({"sampling": Sampling(top_p=0.5)}, "sampling: another content"),
        ({"template": "{{ response }}"}, "template: not given there, {{ response }} now"),
        # What was chosen, and is left open now, is another choice.
        ({"precision": ...}, "precision: float32 there, not given now"),
        ({"load_in_4bit": True}, "load_in_4bit: False there, True now"),
    ],
)
def test_a_stage_of_something_else_is_refused_with_what_differs(
    seed_model, uninterrupted, killed, tmp_path, where, change, words
):
    # One that is done, and one with a checkpoint.
    out = shutil.copytree(uninterrupted if where == "uninterrupted" else killed / "5", tmp_path / "stage")
    names = sorted(path.name for path in out.iterdir())
    asked = {"records": make_records(), "validation": make_records(6, seed=1), "seed_model": seed_model, **STAGE}
    asked = {name: value for name, value in {**asked, **change}.items() if value is not ...}
    with pytest.raises(
        ValueError, match=f"other settings: choose another output, or these again:\n  {re.escape(words)}"
    ) as refusal:
        train_adapter(asked.pop("records"), out, **asked)
    assert len(str(refusal.value).splitlines()) == 2
    assert sorted(path.name for path in out.iterdir()) == names


@trains
@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_stage_that_is_moved_keeps_the_weights_it_was_begun_with(
    seed_model, uninterrupted, tmp_path, monkeypatch, elsewhere
):
    out = shutil.copytree(uninterrupted, tmp_path / "stage")
    monkeypatch.setattr("tract_lite.training.stage.pick_4bit", lambda: elsewhere)
    asked = {**STAGE, "seed_model": seed_model, "validation": make_records(6, seed=1)}
    del asked["load_in_4bit"]
    assert train_adapter(make_records(), out, **asked) == out / "adapter"


@trains
def test_a_start_that_trained_nothing_leaves_the_folder_free_for_other_settings(seed_model, tmp_path):
    asked = {**STAGE, "seed_model": seed_model, "settings": ONE_STEP}
    with pytest.raises(ValueError, match="out of 10: .*longer than 8 tokens"):
        train_adapter(make_records(), tmp_path, **{**asked, "max_length": 8})
    read_as_one = ScoreScale(("é", "e\u0301"), (1, 5))
    with pytest.raises(ValueError, match="have the same tokens in this vocabulary"):
        train_adapter(make_records(), tmp_path, **{**asked, "scale": read_as_one})
    adapter = train_adapter(make_records(), tmp_path, **asked)
    assert JudgeSpec.load(adapter).max_length == 128


@trains
@pytest.mark.parametrize("load_in_4bit, precision", [(True, "float32"), (False, "bfloat16")])
def test_what_is_asked_of_the_seed_model_reaches_the_spec(seed_model, tmp_path, load_in_4bit, precision):
    asked = {
        "template": "{{ response }}",
        "marker": "the score is",
        "sampling": Sampling(temperature=0.5, max_new_tokens=7),
        "max_length": 100,
    }
    loaded = {"load_in_4bit": load_in_4bit, "precision": precision}
    records = [replace(record, prompt=None, response=record.prompt) for record in make_records(4)]
    stage = {"seed_model": seed_model, "scale": SCALE, "settings": ONE_STEP, **asked, **loaded}
    spec = JudgeSpec.load(train_adapter(records, tmp_path, **stage))
    assert replace(spec, **asked) == spec and spec.scale == SCALE and spec.base_model == str(seed_model)
    assert spec.method.items() >= {**loaded, "max_steps": 1, "raft_weight": 1.0, "direct_share": 0.0}.items()


@trains
def test_the_seed_of_the_settings_is_that_of_the_adapter(seed_model, tmp_path):
    asked = {**STAGE, "seed_model": seed_model}
    first, second = (
        weights_in(train_adapter(make_records(4), tmp_path / str(seed), **{**asked, "settings": settings}))
        for seed, settings in ((1, replace(ONE_STEP, seed=1)), (2, replace(ONE_STEP, seed=2)))
    )
    assert not any(torch.equal(first[name], second[name]) for name in first if "lora_A" in name)


@trains
def test_a_stage_may_begin_with_the_weights_of_another_and_only_with_those(seed_model, tmp_path):
    asked = {**STAGE, "seed_model": seed_model}
    first = train_adapter(make_records(4), tmp_path / "first", **{**asked, "settings": ONE_STEP})
    still = {**asked, "settings": replace(ONE_STEP, learning_rate=1e-12, seed=7)}
    second = train_adapter(make_records(4), tmp_path / "second", start=first, **still)
    weights = weights_in(second)
    for name, weight in weights_in(first).items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="start: "):
        train_adapter(make_records(4), tmp_path / "second", **still)


@trains
def test_a_trained_adapter_judges_as_the_model_that_was_trained(seed_model, tmp_path, float32_cpu):
    model, tokenizer, spec = open_seed_model(seed_model, SCALE, max_length=128, sampling=Sampling(max_new_tokens=8))
    model = add_lora(model)
    train_stage(model, tokenizer, make_records(), spec, tmp_path, TrainSettings(**{**SHORT, "max_steps": 3}))
    with Judge.from_model(model, tokenizer, spec) as trained, Judge.from_adapter(tmp_path) as judge:
        asked = make_records(3, seed=2)
        assert list(judge.score_many(asked)) == list(trained.score_many(asked))


@trains
def test_the_adapter_that_agrees_best_with_the_validation_records_is_kept(seed_model, tmp_path):
    model, tokenizer, spec = load(seed_model)
    settings = TrainSettings(**{**SHORT, "learning_rate": 0.3}, scheduler="constant", warmup_ratio=0, save_every=1)
    result = train_stage(model, tokenizer, make_records(), spec, tmp_path, settings, validation=make_records(6, 1))
    rmse = {entry["step"]: entry["eval_rmse"] for entry in result["log"] if "eval_rmse" in entry}
    assert list(rmse) == list(range(1, 10))
    assert any("eval_pearson" in entry for entry in result["log"])
    kept = result["kept_step"]
    assert rmse[kept] == min(rmse.values()) and kept != 9
    checkpoint = load_file(tmp_path / f"checkpoint-{kept}" / "adapter_model.safetensors")
    for name, weight in weights_in(tmp_path / "adapter").items():
        torch.testing.assert_close(weight, checkpoint[name], rtol=0, atol=0)


@trains
def test_validation_scores_are_those_of_a_judge_given_the_same_reasonings(seed_model, tmp_path):
    model, tokenizer, spec = load(seed_model)
    held_out = make_records(7, seed=1)
    settings = TrainSettings(**{**SHORT, "max_steps": 3})
    result = train_stage(model, tokenizer, make_records(), spec, tmp_path, settings, validation=held_out)
    [logged] = [entry for entry in result["log"] if "eval_rmse" in entry]
    vocabulary = TransformersVocabulary(tokenizer)
    reasonings = [[vocabulary.encode(record.feedback)] for record in held_out]
    judged = Judge.from_model(model, tokenizer, spec).score_many(held_out, reasonings=reasonings)
    figures = evaluate([j.score for j in judged], [record.score for record in held_out])
    assert logged["eval_rmse"] == pytest.approx(figures["rmse"], rel=1e-4)
    assert logged["eval_pearson"] == pytest.approx(figures["pearson"], abs=1e-3)


def direct_settings(share: float) -> TrainSettings:
    sizes: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 8, "learning_rate": 2e-2, "max_steps": 50}
    return TrainSettings(**sizes, direct_share=share)


@trains
def test_a_share_of_direct_sequences_teaches_to_score_without_a_reasoning_too(seed_model, tmp_path):
    records, errors = make_records(8), {}
    for share, direct in ((0.0, 0), (0.5, 8)):
        model, tokenizer, spec = load(seed_model)
        result = train_stage(model, tokenizer, records, spec, tmp_path / str(share), direct_settings(share))
        assert (result["records"], result["examples"], result["direct"]) == (8, 8 + direct, direct)
        judged = Judge.from_model(model, tokenizer, spec).score_many(records, n_cot=0)
        errors[share] = evaluate([j.score for j in judged], [record.score for record in records])["rmse"]
    assert errors[0.5] < 0.9 * errors[0.0]


@trains
def test_a_stage_of_direct_sequences_alone_needs_no_reasonings_and_is_validated_directly(seed_model, tmp_path):
    model, tokenizer, spec = load(seed_model)
    bare = [[replace(record, feedback=None) for record in make_records(10, seed)] for seed in (0, 1)]
    result = train_stage(model, tokenizer, bare[0], spec, tmp_path, direct_settings(1), validation=bare[1])
    assert (result["examples"], result["direct"], result["validation"]) == (10, 10, 10)
    judged = Judge.from_model(model, tokenizer, spec).score_many(bare[1], n_cot=0)
    rmse = evaluate([j.score for j in judged], [record.score for record in bare[1]])["rmse"]
    assert min(entry["eval_rmse"] for entry in result["log"] if "eval_rmse" in entry) == pytest.approx(rmse, rel=1e-3)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="direct_share must be from 0 to 1"):
        TrainSettings(direct_share=share)


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from stages import trained_weights
from test_stage import descend
trainer = descend(Path({seed!r}), Path({out!r}), micro_batch_size=1, scale={scale!r})
# At once: the other process writes to the same place.
sys.stdout.write("processes: %d\\n" % trainer.accelerator.num_processes)
if trainer.is_world_process_zero():
    save_file(trained_weights(trainer.model), Path({out!r}) / "weights.safetensors")
    log = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_rmse" in entry]
    (Path({out!r}) / "log.json").write_text(json.dumps(log))
"""


def descend(seed_model: Path, out: Path, micro_batch_size: int, scale: str) -> CotRaftTrainer:
    """Two epochs of two steps each of plain gradient descent, with a validation at each step."""
    model, tokenizer, _ = load(seed_model)
    spec, vocabulary = make_spec(tokenizer, ScoreScale.parse(scale), max_length=128), TransformersVocabulary(tokenizer)
    examples, _ = encode_records(make_records(16), spec, vocabulary)
    validated, _ = encode_records(make_records(5, seed=1), spec, vocabulary)
    settings = TrainSettings(
        batch_size=8, micro_batch_size=micro_batch_size, learning_rate=0.05, epochs=2, save_every=1, **DESCENT
    )
    trainer = CotRaftTrainer(model, examples, spec, tokenizer, out, settings, validated)
    trainer.train()
    return trainer


# On 0-10, how often a process computes hangs on its own gold scores.
@trains
@pytest.mark.parametrize("scale", ["1-5", "0-10"])
def test_two_processes_take_the_steps_of_one(seed_model, tmp_path, scale):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(seed=str(seed_model), out=str(tmp_path / "two"), scale=scale))
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    options = "--mixed_precision no --dynamo_backend no --main_process_port 0"
    done = subprocess.run(
        [sys.executable, *launch.split(), *options.split(), str(script)],
        env={**python_environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("processes: 2") == 2
    alone = descend(seed_model, tmp_path / "one", micro_batch_size=4, scale=scale)
    expected, found = trained_weights(alone.model), load_file(tmp_path / "two/weights.safetensors")
    moved = max(weight.abs().max() for name, weight in expected.items() if "lora_B" in name)
    assert moved > 1e-2
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5 * moved)
    logged = json.loads((tmp_path / "two/log.json").read_text())
    history = [e for e in alone.state.log_history if "loss" in e or "eval_rmse" in e]
    assert len(logged) == len(history) == 8
    for theirs, ours in zip(logged, history):
        for name in {"loss", "ce", "raft", "score_mae", "eval_rmse", "eval_pearson"} & set(ours):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4)


def test_a_batch_that_can_not_be_split_over_the_processes_is_refused():
    assert TrainSettings(batch_size=8, micro_batch_size=2).accumulation(2) == 2
    with pytest.raises(ValueError, match="multiple of micro_batch_size .4. x 3 processes"):
        TrainSettings(batch_size=8, micro_batch_size=4).accumulation(3)


def test_only_a_checkpoint_whose_files_are_all_there_is_resumed_from(tmp_path):
    assert newest_complete_checkpoint(tmp_path / "none") is None
    folders = [tmp_path / f"checkpoint-{steps}" for steps in (9, 10, 200)]
    for folder in folders:
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"12345")
    assert newest_complete_checkpoint(tmp_path) is None
    for folder in folders[:2]:
        (folder / COMPLETE_FILE).write_text(json.dumps({"optimizer.pt": 5}))
    assert newest_complete_checkpoint(tmp_path) == str(folders[1])
    # A drive that had not taken all of it when the session was lost.
    (folders[1] / "optimizer.pt").write_bytes(b"123")
    assert newest_complete_checkpoint(tmp_path) == str(folders[0])
    (folders[0] / "optimizer.pt").unlink()
    assert newest_complete_checkpoint(tmp_path) is None


@trains
def test_dropped_records_are_counted_with_their_reasons(seed_model, tmp_path, caplog):
    model, tokenizer, spec = load(seed_model)
    bad = [
        Record(prompt="x", feedback="y"),
        Record(prompt="x", score=1.0),
        Record(prompt="x", score=2.0),
        Record(response="x", score=2.0, feedback="y"),
        Record(prompt="kind " * 200, score=2.0, feedback="y"),
    ]
    result = train_stage(model, tokenizer, bad + make_records(4), spec, tmp_path, TrainSettings(max_steps=1))
    assert result["records"] == 9 and result["examples"] == 4
    assert sorted(result["dropped"].values()) == [1, 1, 1, 2]
    assert result["dropped"]["no reasoning"] == 2
    assert "2 of 9 records are dropped: no reasoning" in caplog.text


def test_a_stage_of_longer_sequences_than_the_model_reads_is_refused(seed_model, tmp_path):
    model, tokenizer, spec = load(seed_model)
    words = "reads 512 tokens of a sequence, and 513 are asked for\ntake a max_length of 512"
    with pytest.raises(ValueError, match=words):
        train_stage(model, tokenizer, make_records(4), replace(spec, max_length=513), tmp_path, ONE_STEP)
    assert not list(tmp_path.iterdir())


@trains
def test_no_usable_record_is_an_error_with_the_reasons(seed_model, tmp_path):
    model, tokenizer, spec = load(seed_model)
    with pytest.raises(ValueError, match="out of 2: .*no gold score.*2"):
        train_stage(model, tokenizer, [Record(prompt="x", feedback="y")] * 2, spec, tmp_path)
    assert not (tmp_path / RESULT_FILE).exists()


@pytest.mark.parametrize(
    "asked, steps, expected",
    [(None, 3000, 1e-5), (None, 25_000, 1e-5), (None, 2999, 2e-4), (None, 1, 2e-4), (3e-3, 25_000, 3e-3)],
)
def test_the_learning_rate_is_the_one_asked_for_or_fits_the_steps(asked, steps, expected):
    rate, reason = TrainSettings(learning_rate=asked).pick_learning_rate(steps)
    assert rate == expected and reason


def test_the_order_depends_on_seed_and_epoch_alone_and_misses_nothing():
    def order(seed, epoch):
        sampler = LengthGroupedSampler([n % 7 for n in range(40)], 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(40))
    assert order(0, 0) == order(0, 0) != order(0, 1)
    assert order(0, 0) != order(5, 0)


def toy_seed_model(**options: Any) -> Path:
    return make_toy_seed_model(make_records(40), SCALE, **{"vocabulary_size": 400, "max_length": 128, **options})


@trains
def test_a_toy_seed_model_has_learnt_to_answer_its_records(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACT_LITE_CACHE", str(tmp_path))
    losses = []
    for steps in (1, 40):
        model, tokenizer, spec = open_seed_model(toy_seed_model(steps=steps), SCALE, load_in_4bit=False, max_length=128)
        examples, dropped = encode_records(make_records(40), spec, TransformersVocabulary(tokenizer))
        assert len(examples) == 40 and not dropped
        batch = collate(examples, 0)
        with torch.no_grad():
            losses.append(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item())
    assert losses[1] < 0.3 * losses[0]
    assert model.config.vocab_size <= 400
    assert len(list(tmp_path.iterdir())) == 2


@trains
def test_a_toy_seed_model_is_made_once_for_its_records(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACT_LITE_CACHE", str(tmp_path))
    folder = toy_seed_model(steps=1)
    weights = (folder / "model.safetensors").stat()
    # The sampling changes nothing of it.
    assert toy_seed_model(steps=1, sampling=Sampling(top_p=0.5)) == folder
    assert (folder / "model.safetensors").stat() == weights
    others = {
        toy_seed_model(**{"steps": 1, **change})
        for change in ({"steps": 2}, {"max_length": 100}, {"marker": "the score"})
    }
    assert len({folder, *others}) == 4 == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize(
    "options, words",
    [({"vocabulary_size": 5}, "[Vv]ocab"), ({"max_length": 8}, "out of 40: longer than 8 tokens .*: 40")],
)
def test_a_toy_seed_model_that_can_not_be_made_says_why_and_leaves_nothing(tmp_path, monkeypatch, options, words):
    monkeypatch.setenv("TRACT_LITE_CACHE", str(tmp_path))
    with pytest.raises((RuntimeError, ValueError), match=words):
        toy_seed_model(steps=1, **options)
    assert not list(tmp_path.iterdir())
