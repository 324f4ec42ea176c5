"""Seed models: how they load, which backend holds them, judges on them, the time of a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from judges import randomise, seed_models
from peft import LoraConfig, get_peft_model
from stages import SCALE, load_exact, small_seed_model
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as bars

from tract_lite.judge import Judge
from tract_lite.record import Record
from tract_lite.spec import DEFAULT_TEMPLATE, Sampling
from tract_lite.training.layers import full_logits, head_options, lm_head_weight
from tract_lite.training.precision import BFLOAT16_UNITS, has_bfloat16_units, pick_4bit, pick_dtype
from tract_lite.training.seed_model import (
    HIDDEN_STATES_SWITCH,
    IMPORT_SWITCHES,
    add_lora,
    compute_dtype,
    for_training,
    hidden_states,
    load_adapter,
    load_seed,
    longest_sequence,
    open_seed_model,
)

plain_families = pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])


@pytest.fixture(scope="module")
def seeds(shared_once):
    return seed_models(shared_once)


@pytest.fixture(scope="module")
def small(shared_once):
    return small_seed_model(shared_once)


@pytest.fixture
def batch():
    """Two rows, the second with padding on the right."""
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return ids, mask


def real(tensor, mask):
    return tensor[mask.bool()]


def test_the_precision_comes_with_a_reason():
    dtype, reason = pick_dtype()
    assert dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert str(dtype).removeprefix("torch.") in reason


def pretend_card(monkeypatch, name: str, capability: tuple[int, int], oldest="sm_75") -> None:
    """A CUDA card of that name, with a torch that has kernels for cards from a T4 on, or older."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [oldest, "sm_80", "sm_90", "sm_100"])


@pytest.mark.parametrize(
    "name, capability, expected",
    [
        ("Tesla T4", (7, 5), torch.float16),
        ("NVIDIA A100", (8, 0), torch.bfloat16),
        ("NVIDIA L4", (8, 9), torch.bfloat16),
        ("NVIDIA B200", (10, 0), torch.bfloat16),
    ],
)
def test_a_card_computes_in_16_bits_as_its_units_can(monkeypatch, name, capability, expected):
    pretend_card(monkeypatch, name, capability)
    dtype, reason = pick_dtype()
    assert dtype == expected and name in reason
    assert pick_dtype("float32")[0] == torch.float32


@pytest.mark.parametrize("oldest", ["sm_75", "sm_60"])
def test_a_card_without_kernels_is_refused_before_anything_is_loaded(monkeypatch, tmp_path, oldest):
    pretend_card(monkeypatch, "Tesla P100-PCIE-16GB", (6, 0), oldest)
    with pytest.raises(RuntimeError, match="P100.*too old.*begin at 7.0.*T4 x2"):
        load_seed(tmp_path / "nothing here")


def pretend_cpu(monkeypatch, units: set[str], has_onednn: bool = True) -> None:
    """A machine without CUDA, whose CPU has these units and no others for bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    known = {"avx2": True, "l2_cache_size": 1024, **{name: name in units for name in BFLOAT16_UNITS}}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)


@pytest.mark.parametrize(
    "units, has_onednn, expected",
    [
        (set(), True, torch.float32),
        *(({name}, True, torch.bfloat16) for name in BFLOAT16_UNITS),
        ({"bf16"}, False, torch.float32),
    ],
)
def test_a_cpu_computes_in_bfloat16_where_it_has_units_for_it(small, monkeypatch, units, has_onednn, expected):
    pretend_cpu(monkeypatch, units, has_onednn)
    assert has_bfloat16_units() == (expected == torch.bfloat16)
    name = str(expected).removeprefix("torch.")
    assert name in pick_dtype()[1]
    model, _, spec = open_seed_model(small, SCALE, max_length=96)
    assert compute_dtype(model) == model.model.layers[0].mlp.up_proj.weight.dtype == expected
    assert spec.method == {"load_in_4bit": False, "precision": name}
    adapter = [weight for weight in add_lora(model).parameters() if weight.requires_grad]
    assert {weight.dtype for weight in adapter} == {torch.float32}


def test_an_older_torch_that_does_not_tell_its_cpu_s_units_computes_in_float32(monkeypatch):
    pretend_cpu(monkeypatch, set(BFLOAT16_UNITS))
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert pick_dtype()[0] == torch.float32


def test_weights_are_in_4_bits_on_a_gpu_alone_unless_asked(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert (pick_4bit(), pick_4bit(True), pick_4bit(False)) == (there, True, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_the_cpu_computes_in_what_it_is_asked_for(small):
    for precision in ("float32", "bfloat16"):
        assert compute_dtype(load_seed(small, precision=precision)[0]) == getattr(torch, precision)
    for precision, words in (("float16", "needs a GPU"), ("int8", "must be one of")):
        with pytest.raises(ValueError, match=words):
            load_seed(small, precision=precision)


def test_a_seed_comes_in_4_bits_with_a_padding_token(seeds):
    model, tokenizer = load_exact(seeds["llama"], in_4bit=True)
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds == {"Linear4bit"}
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert tokenizer.pad_token_id is not None and tokenizer.padding_side == "right"


def test_a_folder_s_model_is_loaded_without_a_bar_and_the_bars_stay_as_they_were(small, capsys):
    for shown in (True, False):
        (bars.enable_progress_bar if shown else bars.disable_progress_bar)()
        load_seed(small, load_in_4bit=False)
        assert bars.is_progress_bar_enabled() is shown
    bars.enable_progress_bar()
    assert "Loading weights" not in capsys.readouterr().err


def test_an_unknown_backend_is_refused(seeds):
    with pytest.raises(ValueError, match="'jax'"):
        load_seed(seeds["llama"], backend="jax")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_unsloth_without_cuda_is_refused_with_a_way_out(seeds):
    with pytest.raises(RuntimeError, match="backend='transformers'"):
        load_seed(seeds["llama"], backend="unsloth")


@pytest.mark.parametrize(
    "spoil, words",
    [
        ({"config.json": None}, "is not the folder of a model: it has no config.json"),
        ({"config.json": "{"}, "can't be loaded .*not a valid JSON file"),
        ({"config.json": '{"model_type": "nosuch"}'}, "can't be loaded .*nosuch.*\n?.* a kind that"),
        ({"model.safetensors": "x" * 999}, "can't be loaded .*header.*\n?is it whole"),
        ({"model.safetensors": None}, "can't be loaded .*no file named model.safetensors"),
        ({"tokenizer.model": None, "tokenizer_config.json": None}, "can't be loaded .*tokenizer"),
        ({"tokenizer.json": "{", "tokenizer_config.json": "{"}, "can't be loaded"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_told_by_name(small, tmp_path, spoil, words):
    folder = shutil.copytree(small, tmp_path / "seed model")
    for name, text in spoil.items():
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)
    with pytest.raises(ValueError, match=words) as told:
        load_exact(folder)
    assert str(folder) in str(told.value) and len(str(told.value).splitlines()) <= 2


# Answers as the hub does, to a process that takes it for the hub.
ASK_HUB = """
import os, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.split("/")[1]
        self.send_response(403 if name == "gated" else 401)
        self.send_header("X-Error-Code", {"gated": "GatedRepo"}.get(name, "RepoNotFound"))
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_HEAD = do_GET
    log_message = lambda *_: None

hub = HTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=hub.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"
from tract_lite.training.seed_model import load_seed
for name in sys.argv[1:]:
    try:
        load_seed(name, backend="transformers")
    except FileNotFoundError as error:
        print(error)
"""


@pytest.mark.export
def test_a_model_that_the_hub_does_not_give_is_told_with_the_next_step(tmp_path):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    place = {**plain, "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ASK_HUB, "gated/model", "nosuch/model", "./nosuch folder"],
        env={**place, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    gated, unknown, other = done.stdout.splitlines()
    assert gated.startswith("no folder gated/model here, and the hub asks for consent: give it on its page there")
    assert unknown.startswith("no folder nosuch/model here, and the hub does not show it: check the name")
    assert other == "no folder ./nosuch folder, and no id of the hub looks like that"
    offline = {**place, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "from tract_lite.training.seed_model import load_seed; load_seed('nosuch/model', backend='transformers')"
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True)
    assert "HF_HUB_OFFLINE is set, and the cache lacks it: fetch it" in done.stderr.splitlines()[-1]


@plain_families
@pytest.mark.parametrize("in_4bit", [True, False])
def test_lora_is_on_every_linear_layer_of_the_blocks_and_nothing_else_is_trained(seeds, family, in_4bit):
    model, _ = load_exact(seeds[family], in_4bit)
    linear_layers = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.")
    }
    model = add_lora(model)
    trained = {
        name.removeprefix("base_model.model.")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert linear_layers and trained == {
        f"{name}.lora_{part}.default.weight" for name in linear_layers for part in "AB"
    }


def test_rank_and_alpha_are_those_asked_for(seeds):
    model = add_lora(load_exact(seeds["llama"])[0], rank=4, alpha=12)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape[0] == 4 and layer.scaling["default"] == 3


def test_the_same_random_seed_gives_the_same_adapter(seeds):
    first, second = (add_lora(load_exact(seeds["llama"])[0], seed=7).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first if "lora_A" in name)


@plain_families
def test_a_fresh_adapter_changes_nothing(seeds, family, batch):
    model, _ = load_exact(seeds[family], in_4bit=True)
    with torch.no_grad():
        before = model(*batch).logits
        after = add_lora(model).eval()(*batch).logits
    torch.testing.assert_close(real(after, batch[1]), real(before, batch[1]), rtol=0, atol=1e-6)


@plain_families
def test_hidden_states_are_those_before_the_vocabulary_projection(seeds, family, batch):
    model, _ = load_exact(seeds[family])
    with torch.no_grad():
        ours = hidden_states(model, *batch)
        theirs = model.model(*batch).last_hidden_state
        logits = model(*batch).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    projected = linear(ours, lm_head_weight(model))
    torch.testing.assert_close(projected, logits, rtol=1e-5, atol=1e-5)


def test_hidden_states_carry_a_gradient_through_gradient_checkpointing(seeds, batch):
    gradients = []
    direction = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(1))
    for checkpointing in (True, False):
        model, _ = load_exact(seeds["llama"], in_4bit=True)
        model = add_lora(model, gradient_checkpointing=checkpointing).train()
        (hidden_states(model, *batch) * direction).sum().backward()
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        )
    assert all(gradient.isfinite().all() for gradient in gradients[0].values())
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients)


def test_nothing_that_is_frozen_or_below_the_first_adapter_gets_a_gradient(seeds, batch):
    model = add_lora(load_exact(seeds["llama"])[0], gradient_checkpointing=False).train()
    embedded: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[-1]))
    hidden_states(model, *batch).sum().backward()
    assert [tensor.requires_grad for tensor in embedded] == [False]
    assert {weight.grad is None for weight in model.parameters() if not weight.requires_grad} == {True}


@pytest.mark.parametrize(
    "kind, softcap, scale",
    [("gemma2", 30.0, 1.0), ("granite", None, 0.125), ("cohere", None, 0.0625), ("phi", None, 1.0)],
)
def test_what_a_model_does_with_its_logits_is_known(kind, softcap, scale, batch):
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    scaling = {"logits_scaling": 8.0} if kind == "granite" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **scaling)).eval()
    head = head_options(model)
    assert (head["softcap"], head["logit_scale"]) == (softcap, scale)
    assert (head["head_bias"] is not None) == (kind == "phi")
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
        logits = linear(hidden_states(model, *batch), lm_head_weight(model), head["head_bias"]) * scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        torch.testing.assert_close(logits, full_logits(model, *batch), rtol=1e-5, atol=1e-5)


def test_a_saved_adapter_gives_the_same_model_back(seeds, batch, tmp_path):
    model = add_lora(load_exact(seeds["llama"], in_4bit=True)[0])
    with torch.no_grad():
        expected = randomise(model).eval()(*batch).logits
        model.save_pretrained(tmp_path)
        loaded = load_adapter(load_exact(seeds["llama"], in_4bit=True)[0], tmp_path)
        ours = loaded(*batch).logits
    assert not loaded.training
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_judging_with_a_4_bit_seed_changes_no_later_gradient(seeds, batch):
    """On some CPUs bitsandbytes repacks weights at their first evaluation and loses gradients."""
    direction = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for judged in (False, True):
        model = add_lora(load_exact(seeds["llama"], in_4bit=True)[0])
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        if judged:
            with torch.no_grad():
                model.eval()(*batch)
        (hidden_states(model.train(), *batch) * direction).sum().backward()
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        )
    torch.testing.assert_close(*gradients)


@pytest.fixture
def no_unsloth(monkeypatch):
    """A module of that name, imported, which can do nothing."""
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_of_transformers_is_one_also_where_unsloth_is_imported(small, batch, no_unsloth, one_process):
    model, _ = load_exact(small)
    expected = model.model(*batch).last_hidden_state
    model = add_lora(model)
    for_training(model)
    assert model.training
    for held in (model, DistributedDataParallel(model)):
        torch.testing.assert_close(hidden_states(held, *batch), expected, rtol=0, atol=0)


class Linear4bit(torch.nn.Linear):
    """Has a name like that of bitsandbytes'."""


class FastLanguageModel:
    """Stands for Unsloth's: the models and adapters are plain ones, and every call is noted.

    Sequences are cut as there. What it may leave out: 4 bits, and hidden states in place of logits.
    """

    calls: list[tuple[str, dict[str, Any]]] = []
    quantises, switches = True, True

    @classmethod
    def from_pretrained(cls, name: str, max_seq_length: int, load_in_4bit: bool, **options: Any) -> tuple[Any, Any]:
        asked = {"max_seq_length": max_seq_length, "load_in_4bit": load_in_4bit, **options}
        cls.calls.append(("from_pretrained", {"name": name, **asked}))
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        model.max_seq_length, forward = max_seq_length, model.forward
        for layer in model.model.modules():
            if load_in_4bit and cls.quantises and type(layer) is torch.nn.Linear:
                layer.__class__ = Linear4bit

        def with_switch(**named: Any) -> Any:
            cut = {name: named[name][:, :max_seq_length] for name in ("input_ids", "attention_mask")}
            answer = forward(**named | cut | {"output_hidden_states": True})
            if cls.switches and os.environ.get(HIDDEN_STATES_SWITCH) == "1":
                answer.logits = answer.hidden_states[-1]
            return answer

        model.forward = with_switch
        return model, AutoTokenizer.from_pretrained(name)

    @classmethod
    def get_peft_model(cls, model: Any, **options: Any) -> Any:
        cls.calls.append(("get_peft_model", dict(options)))
        del options["random_state"], options["use_gradient_checkpointing"]
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))

    @classmethod
    def for_training(cls, model: Any) -> None:
        cls.calls.append(("for_training", {}))


@pytest.fixture
def unsloth(monkeypatch):
    """A machine with a card and Unsloth; the calls that it gets."""
    module = ModuleType("unsloth")
    module.__spec__ = ModuleSpec("unsloth", None)
    module.FastLanguageModel = FastLanguageModel
    monkeypatch.setitem(sys.modules, "unsloth", module)
    monkeypatch.setattr(FastLanguageModel, "calls", [])
    monkeypatch.delenv(HIDDEN_STATES_SWITCH, raising=False)
    for name in IMPORT_SWITCHES:
        monkeypatch.setenv(name, "as it was")
    with monkeypatch.context() as card:
        pretend_card(card, "NVIDIA A100", (8, 0))
        yield FastLanguageModel.calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_a_model_that_unsloth_has_loaded_is_asked_in_its_way(small, batch, unsloth, one_process):
    model, tokenizer = load_seed(small, max_seq_length=300)
    assert tokenizer.pad_token_id is not None
    expected = model.model(*batch).last_hidden_state
    logits = linear(expected, model.lm_head.weight)
    adapted = add_lora(model, rank=4, alpha=12, seed=7)
    for_training(adapted)
    for held in (model, adapted, DistributedDataParallel(adapted)):
        torch.testing.assert_close(hidden_states(held, *batch), expected, rtol=0, atol=0)
        assert os.environ[HIDDEN_STATES_SWITCH] == "0"
        torch.testing.assert_close(full_logits(held, *batch), logits)
    projections = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj".split()
    lora = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.0, "target_modules": projections, "random_state": 7}
    loaded = {"name": str(small), "max_seq_length": 300, "load_in_4bit": True, "dtype": torch.bfloat16}
    assert unsloth == [
        ("from_pretrained", loaded),
        ("get_peft_model", {**lora, "use_gradient_checkpointing": "unsloth"}),
        ("for_training", {}),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_hidden_states_that_can_not_be_had_leave_no_switch_behind(small, batch, unsloth):
    model, _ = load_seed(small, max_seq_length=512)
    with pytest.raises(IndexError):
        hidden_states(model, batch[0] + 10_000, batch[1])
    assert os.environ[HIDDEN_STATES_SWITCH] == "0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_a_model_that_does_not_know_unsloths_switch_is_asked_as_transformers_is(
    small, batch, unsloth, one_process, monkeypatch
):
    monkeypatch.setattr(FastLanguageModel, "switches", False)
    model, _ = load_seed(small, max_seq_length=300)
    expected = model.model(*batch).last_hidden_state
    adapted = add_lora(model)
    for held in (adapted, model, DistributedDataParallel(adapted)):
        for _ in range(2):
            torch.testing.assert_close(hidden_states(held, *batch), expected, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_unsloth_is_imported_without_what_takes_hidden_states_away_and_asks_the_hub(small, unsloth):
    load_seed(small, max_seq_length=512)
    assert (os.environ["UNSLOTH_FUSED_FORWARD"], os.environ["UNSLOTH_DISABLE_STATISTICS"]) == ("0", "1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_a_sequence_that_unsloth_would_cut_is_refused(small, batch, unsloth):
    model, _ = load_seed(small, max_seq_length=11)
    with pytest.raises(ValueError, match="a sequence has 12 tokens, and the model was loaded for 11\n"):
        hidden_states(model, *batch)
    hidden_states(model, *(tensor[:, :11] for tensor in batch))
    assert longest_sequence(add_lora(model)) == 11


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_unsloth_is_not_asked_for_more_than_the_model_s_own_positions(small, unsloth):
    load_seed(small, max_seq_length=512)
    with pytest.raises(
        ValueError, match="reads 512 tokens of a sequence, and 513 are asked for\ntake a max_length of 512"
    ):
        load_seed(small, max_seq_length=513)


def test_a_spec_has_no_more_tokens_than_the_seed_model_reads(seeds, caplog):
    options = {"load_in_4bit": False, "precision": "float32"}
    _, _, spec = open_seed_model(seeds["llama"], SCALE, max_length=3000, **options)
    assert spec.max_length == 512
    assert "the seed model reads 512 tokens of a sequence, not 3000: longer items are left out" in caplog.text
    caplog.clear()
    _, _, spec = open_seed_model(seeds["llama"], SCALE, max_length=500, **options)
    assert spec.max_length == 500 and "tokens of a sequence" not in caplog.text


def test_a_model_reads_as_many_tokens_as_it_has_positions_for(seeds):
    assert longest_sequence(load_exact(seeds["llama"])[0]) == 512


NOT_IN_4_BITS = "asked for in 4 bits, and has loaded without them\n.*python -m bitsandbytes"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_a_load_in_4_bits_that_is_none_is_refused(small, tmp_path, unsloth, monkeypatch):
    monkeypatch.setattr(FastLanguageModel, "quantises", False)
    load_seed(small, False, max_seq_length=512)
    with pytest.raises(RuntimeError, match=NOT_IN_4_BITS):
        load_seed(small, max_seq_length=512)


def test_a_model_all_of_whose_layers_are_kept_out_of_4_bits_is_refused(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "kept")
    config = json.loads((folder / "config.json").read_text())
    kept = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["model", "lm_head"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": kept}))
    with pytest.raises(RuntimeError, match=NOT_IN_4_BITS):
        load_seed(folder, True, backend="transformers")


RECORDS = [Record(prompt="The answer"), Record(prompt="Why so? It is kind.")]
OPENED: dict[str, Any] = {
    "max_length": 96,
    "template": "{{ response }}",
    "marker": "the score is",
    "sampling": Sampling(max_new_tokens=5),
}


def scores(judge: Judge) -> list[float]:
    with judge:
        return [judgement.score for judgement in judge.score_many(RECORDS)]


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_an_adapter_judges_as_the_model_that_was_trained(small, tmp_path, load_in_4bit):
    seed_model = tmp_path / "seed"
    seed_model.symlink_to(small)
    model, tokenizer, spec = open_seed_model(seed_model, SCALE, load_in_4bit=load_in_4bit, **OPENED)
    model = randomise(add_lora(model))
    model.save_pretrained(tmp_path / "stage" / "adapter")
    spec.save(tmp_path / "stage" / "adapter")
    expected = scores(Judge.from_model(model, tokenizer, spec))
    assert len(set(expected)) == 2
    judge = Judge.from_adapter(tmp_path / "stage" / "adapter")
    assert judge.spec == spec and judge.how()["adapter"] and scores(judge) == expected
    moved = seed_model.rename(tmp_path / "moved")
    with pytest.raises(OSError):
        Judge.from_adapter(tmp_path / "stage")
    assert scores(Judge.from_adapter(tmp_path / "stage", seed_model=moved)) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="bfloat16 on the CPU")
def test_an_adapter_judges_in_the_precision_that_is_asked_for(small, tmp_path):
    model, _, spec = open_seed_model(small, SCALE, load_in_4bit=False)
    add_lora(model).save_pretrained(tmp_path)
    spec.save(tmp_path)
    with Judge.from_adapter(tmp_path, precision="bfloat16", parallel=3) as judge:
        assert judge.engine.shape == {"batch_size": 3, "dtype": "bfloat16"}


def test_a_folder_without_an_adapter_is_no_judge(tmp_path):
    with pytest.raises(ValueError, match="no judge spec"):
        Judge.from_adapter(tmp_path)


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_seed_model_is_opened_as_asked_and_its_spec_says_how(small, load_in_4bit):
    with Judge.from_seed(small, SCALE, load_in_4bit=load_in_4bit, precision="float32", **OPENED) as judge:
        assert replace(judge.spec, **OPENED) == judge.spec and judge.spec.scale == SCALE
        assert judge.spec.base_model == str(small)
        assert judge.spec.method == {"load_in_4bit": load_in_4bit, "precision": "float32"}
        kinds = {type(module).__name__ for name, module in judge.engine.model.named_modules() if "_proj" in name}
        assert kinds == {"Linear4bit" if load_in_4bit else "Linear"}
    with Judge.from_seed(small, SCALE) as judge:
        assert judge.spec.template == DEFAULT_TEMPLATE and judge.spec.max_length == 512


def test_a_seed_model_judges_before_any_training(small):
    model, tokenizer, spec = open_seed_model(small, SCALE, **OPENED)
    expected = scores(Judge.from_model(model, tokenizer, spec))
    assert scores(Judge.from_seed(small, SCALE, **OPENED)) == expected
