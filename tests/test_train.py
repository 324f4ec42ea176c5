import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_family, make_sentences, make_spm

from tract_lite.judge import Judge
from tract_lite.loss import cot_raft_loss
from tract_lite.metrics import evaluate
from tract_lite.record import Record
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec, make_spec
from tract_lite.training.encode import LengthGroupedSampler, collate, encode_records
from tract_lite.training.seed_model import add_lora, hidden_states, lm_head_weight, load_seed
from tract_lite.training.settings import RESULT_FILE, TrainSettings
from tract_lite.training.stage import newest_complete_checkpoint, train_stage
from tract_lite.training.trainer import COMPLETE_FILE, CotRaftTrainer
from tract_lite.vocabulary import TransformersVocabulary

SHORT = dict(batch_size=4, micro_batch_size=2, learning_rate=1e-2, log_every=1, epochs=3)


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    return make_family(folder / "seed", make_spm(folder / "spm", make_sentences()), "llama", layers=1)


def make_records(count: int = 10, seed: int = 0) -> list[Record]:
    """Responses whose first word tells the score."""
    rng = random.Random(seed)
    words = ("wrong", "short", "kind", "clear", "right")
    records = []
    for n in range(count):
        score = rng.randrange(5)
        filler = " ".join(rng.choices(words, k=rng.randint(1, 9)))
        records.append(
            Record(prompt=f"{words[score]} {filler}\n", score=score + 1.0, feedback=f"It is {words[score]}.", id=str(n))
        )
    return records


def load(seed: Path):
    model, tokenizer = load_seed(seed, False, backend="transformers")
    spec = make_spec(tokenizer, ScoreScale.integers(1, 5), max_length=128)
    return add_lora(model), tokenizer, spec


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_stage_lowers_the_loss_and_leaves_an_adapter_with_its_spec(seed, tmp_path):
    model, tokenizer, spec = load(seed)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="bfloat16 on the CPU")
def test_a_stage_in_bfloat16_learns_as_well(seed, tmp_path):
    model, tokenizer = load_seed(seed, False, backend="transformers", precision="bfloat16")
    spec = make_spec(tokenizer, ScoreScale.integers(1, 5), max_length=128)
    settings = TrainSettings(**{**SHORT, "learning_rate": 2e-2, "epochs": 8})
    log = train_stage(add_lora(model), tokenizer, make_records(), spec, tmp_path, settings)["log"]
    losses = [entry["ce"] for entry in log if "ce" in entry]
    assert losses[-1] < 0.6 * losses[0]
    assert {weight.dtype for weight in adapter_of(tmp_path).values()} == {torch.float32}


# Plain gradient descent shows the scale of a gradient; Adam hides it.
DESCENT = dict(optimizer="sgd", scheduler="constant", warmup_ratio=0, max_grad_norm=0, log_every=1)


def test_a_step_at_learning_rate_1_ends_in_the_same_weights_however_it_is_split(seed, tmp_path):
    results = []
    for size in (8, 4, 2, 1):
        model, tokenizer, spec = load(seed)
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


@pytest.mark.parametrize("ce_on_score", [True, False])
def test_the_micro_batch_size_changes_no_weight(seed, tmp_path, ce_on_score):
    results = []
    for size in (8, 4, 2, 1):
        model, tokenizer, spec = load(seed)
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


@pytest.mark.parametrize("ce_on_score", [True, False])
def test_the_logged_loss_of_a_step_is_that_of_its_whole_batch(seed, tmp_path, ce_on_score):
    model, tokenizer, spec = load(seed)
    examples, _ = encode_records(make_records(8), spec, TransformersVocabulary(tokenizer))
    batch = collate(examples, tokenizer.pad_token_id)
    with torch.no_grad():
        expected = cot_raft_loss(
            hidden_states(model, batch["input_ids"], batch["attention_mask"]),
            lm_head_weight(model),
            batch["labels"],
            batch["score_positions"],
            torch.tensor(spec.label_ids),
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


KILLED = """
import os, signal
from pathlib import Path
from test_train import SHORT, load, make_records
from tract_lite.settings import TrainSettings
from tract_lite.train import train_stage
from tract_lite.trainer import CotRaftTrainer

compute = CotRaftTrainer.compute_loss
def compute_or_die(self, *args, **options):
    if self.state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(self, *args, **options)
CotRaftTrainer.compute_loss = compute_or_die

model, tokenizer, spec = load(Path({seed!r}))
train_stage(model, tokenizer, make_records(), spec, {out!r}, TrainSettings(save_every=2, **SHORT),
            validation=make_records(6, seed=1))
"""


def python_environment() -> dict[str, str]:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def train_short(seed: Path, out: Path) -> dict:
    model, tokenizer, spec = load(seed)
    return train_stage(
        model,
        tokenizer,
        make_records(),
        spec,
        out,
        TrainSettings(save_every=2, **SHORT),
        validation=make_records(6, seed=1),
    )


@pytest.fixture(scope="module")
def uninterrupted(seed, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, train_short(seed, out)


@pytest.mark.parametrize("step, checkpoint", [(1, None), (5, 4), (8, 8)])
def test_a_killed_stage_goes_on_to_the_adapter_of_an_uninterrupted_one(seed, uninterrupted, tmp_path, step, checkpoint):
    out = tmp_path / "killed"
    code = KILLED.format(step=step, seed=str(seed), out=str(out))
    killed = subprocess.run([sys.executable, "-c", code], env=python_environment(), capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    newest = newest_complete_checkpoint(out)
    assert newest == (str(out / f"checkpoint-{checkpoint}") if checkpoint else None)
    # What a run killed while it saves leaves behind.
    half = out / f"checkpoint-{step + 1}"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")

    # A run folder may be moved before it goes on.
    moved = out.rename(tmp_path / "moved")
    result = train_short(seed, moved)
    whole_folder, whole = uninterrupted
    assert result["log"][-1]["step"] == whole["log"][-1]["step"] == 9
    assert result["kept_step"] == whole["kept_step"]
    resumed = adapter_of(moved)
    for name, weight in adapter_of(whole_folder).items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)


def test_the_adapter_that_agrees_best_with_the_validation_records_is_kept(seed, tmp_path):
    model, tokenizer, spec = load(seed)
    settings = TrainSettings(**{**SHORT, "learning_rate": 0.3}, scheduler="constant", warmup_ratio=0, save_every=1)
    result = train_stage(model, tokenizer, make_records(), spec, tmp_path, settings, validation=make_records(6, 1))
    rmse = {entry["step"]: entry["eval_rmse"] for entry in result["log"] if "eval_rmse" in entry}
    assert list(rmse) == list(range(1, 10))
    assert any("eval_pearson" in entry for entry in result["log"])
    kept = result["kept_step"]
    assert rmse[kept] == min(rmse.values()) and kept != 9
    checkpoint = load_file(tmp_path / f"checkpoint-{kept}" / "adapter_model.safetensors")
    for name, weight in adapter_of(tmp_path).items():
        torch.testing.assert_close(weight, checkpoint[name], rtol=0, atol=0)


def test_validation_scores_are_those_of_a_judge_given_the_same_reasonings(seed, tmp_path):
    model, tokenizer, spec = load(seed)
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


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from test_train import descend, trained_weights
trainer = descend(Path({seed!r}), Path({out!r}), micro_batch_size=2)
# At once: the other process writes to the same place.
sys.stdout.write("processes: %d\\n" % trainer.accelerator.num_processes)
if trainer.is_world_process_zero():
    save_file(trained_weights(trainer.model), Path({out!r}) / "weights.safetensors")
    log = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_rmse" in entry]
    (Path({out!r}) / "log.json").write_text(json.dumps(log))
"""


def descend(seed: Path, out: Path, micro_batch_size: int) -> CotRaftTrainer:
    """Two epochs of two steps each of plain gradient descent, with a validation at each step."""
    model, tokenizer, spec = load(seed)
    vocabulary = TransformersVocabulary(tokenizer)
    examples, _ = encode_records(make_records(16), spec, vocabulary)
    validated, _ = encode_records(make_records(5, seed=1), spec, vocabulary)
    settings = TrainSettings(
        batch_size=8, micro_batch_size=micro_batch_size, learning_rate=0.05, epochs=2, save_every=1, **DESCENT
    )
    trainer = CotRaftTrainer(model, examples, spec, tokenizer, out, settings, validated)
    trainer.train()
    return trainer


def trained_weights(model) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: weight.detach().clone() for name, weight in named if weight.requires_grad}


def test_two_processes_take_the_steps_of_one(seed, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(seed=str(seed), out=str(tmp_path / "two")))
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    options = "--mixed_precision no --dynamo_backend no --main_process_port 0"
    done = subprocess.run(
        [sys.executable, *launch.split(), *options.split(), str(script)],
        env={**python_environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("processes: 2") == 2
    alone = descend(seed, tmp_path / "one", micro_batch_size=4)
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


def test_dropped_records_are_counted_with_their_reasons(seed, tmp_path, caplog):
    model, tokenizer, spec = load(seed)
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


def test_no_usable_record_is_an_error_with_the_reasons(seed, tmp_path):
    model, tokenizer, spec = load(seed)
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
