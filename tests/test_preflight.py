"""The checks before the first step: what they let pass, and the faults that they find."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from judges import randomise, seed_models
from stages import SCALE, load, load_exact, make_records
from tiny import make_family, vocabulary_folder

from tract_lite.spec import make_spec
from tract_lite.training import preflight as preflight_module, trainer as trainer_module
from tract_lite.training.encode import encode_records
from tract_lite.training.preflight import check_labels, preflight
from tract_lite.training.seed_model import add_lora, hidden_states, load_seed
from tract_lite.training.settings import TrainSettings
from tract_lite.training.stage import train_stage
from tract_lite.training.trainer import CotRaftTrainer
from tract_lite.vocabulary import TransformersVocabulary


@pytest.fixture(scope="module")
def seeds(shared_once) -> dict[str, Path]:
    def make(folder: Path) -> None:
        make_family(folder, vocabulary_folder("split digits"), "qwen2")

    return {**seed_models(shared_once), "qwen2": shared_once("qwen2_with_chat_format", make)}


def fly(model, tokenizer, spec, out: Path, **settings) -> None:
    vocabulary = TransformersVocabulary(tokenizer)
    examples, _ = encode_records(make_records(6), spec, vocabulary)
    trainer = CotRaftTrainer(model, examples, spec, tokenizer, out, TrainSettings(**settings))
    preflight(trainer, examples, spec, vocabulary, tokenizer.pad_token_id)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("in_4bit, precision", [(True, "float32"), (False, "float32"), (False, "bfloat16")])
def test_a_sound_model_passes(seeds, tmp_path, caplog, family, in_4bit, precision):
    model, tokenizer = load_seed(seeds[family], in_4bit, backend="transformers", precision=precision)
    spec = make_spec(tokenizer, SCALE, max_length=128)
    with caplog.at_level(logging.INFO):
        fly(add_lora(model), tokenizer, spec, tmp_path)
    assert "preflight: loss" in caplog.text


@pytest.mark.parametrize("dropout, ce_on_score", [(0.0, True), (0.3, True), (0.0, False)])
def test_it_changes_neither_weights_nor_gradients_nor_random_numbers(seeds, tmp_path, dropout, ce_on_score):
    model, tokenizer = load_exact(seeds["llama"])
    spec = make_spec(tokenizer, SCALE, max_length=128)
    model = add_lora(model, dropout=dropout)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    vocabulary = TransformersVocabulary(tokenizer)
    examples, _ = encode_records(make_records(6), spec, vocabulary)
    settings = TrainSettings(ce_on_score=ce_on_score, raft_weight=3.0)
    trainer = CotRaftTrainer(model, examples, spec, tokenizer, tmp_path, settings)
    state = torch.get_rng_state()
    preflight(trainer, examples, spec, vocabulary, tokenizer.pad_token_id)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) and weight.grad is None


def test_an_adapter_that_is_no_longer_new_passes_when_a_stage_goes_on(seeds, tmp_path):
    model, tokenizer, spec = load(seeds["llama"])
    fly(randomise(model), tokenizer, spec, tmp_path)


def of_the_layer_before(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]


def shifted_by_one(model, ids, mask):
    return hidden_states(model, ids, mask).roll(1, dims=1)


def logits_instead(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask).logits


def without_gradient(model, ids, mask):
    return hidden_states(model, ids, mask).detach().requires_grad_()


def not_a_number(model, ids, mask):
    return hidden_states(model, ids, mask) * torch.nan


@pytest.mark.parametrize(
    "fault, words",
    [
        (of_the_layer_before, "by the plain formula"),
        (shifted_by_one, "by the plain formula"),
        (not_a_number, "by the plain formula"),
        (logits_instead, "wide, the model's are"),
        (without_gradient, "14 of 14 LoRA B matrices get no usable gradient"),
    ],
)
def test_a_backend_that_gives_something_else_is_found(seeds, tmp_path, monkeypatch, fault, words):
    for module in (preflight_module, trainer_module):
        monkeypatch.setattr(module, "hidden_states", fault)
    with pytest.raises(RuntimeError, match=words):
        fly(*load(seeds["llama"]), tmp_path)


def test_one_matrix_without_a_gradient_is_found_by_name(seeds, tmp_path):
    model, tokenizer, spec = load(seeds["llama"])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_B["default"].register_full_backward_hook(lambda *_: (None,))
    layer.lora_B["default"].weight.register_hook(torch.zeros_like)
    with pytest.raises(RuntimeError, match="1 of .*mlp.up_proj.lora_B"):
        fly(model, tokenizer, spec, tmp_path)


def test_a_model_without_an_adapter_is_refused(seeds, tmp_path):
    model, tokenizer, spec = load(seeds["llama"])
    with pytest.raises(RuntimeError, match="call add_lora first"):
        fly(model.get_base_model().requires_grad_(False), tokenizer, spec, tmp_path)


def test_a_score_token_that_is_not_the_gold_label_is_found(seeds):
    _, tokenizer, spec = load(seeds["llama"])
    vocabulary = TransformersVocabulary(tokenizer)
    [example], _ = encode_records(make_records(1), spec, vocabulary)
    check_labels([example], spec, vocabulary)
    wrong = replace(example, target=6.0 - example.target if example.target != 3 else 1.0)
    with pytest.raises(RuntimeError, match="gold label is"):
        check_labels([wrong], spec, vocabulary)
    beside = replace(example, score_position=example.score_position - 1)
    with pytest.raises(RuntimeError, match="another vocabulary"):
        check_labels([beside], spec, vocabulary)


def test_a_stage_stops_at_a_fault_before_its_first_step(seeds, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "hidden_states", shifted_by_one)
    model, tokenizer, spec = load(seeds["llama"])
    with pytest.raises(RuntimeError, match="preflight"):
        train_stage(model, tokenizer, make_records(8), spec, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))
