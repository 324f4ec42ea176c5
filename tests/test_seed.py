import pytest
import torch
from tiny import FAMILIES, make_family, make_sentences, make_spm
from torch.nn.functional import linear

from tract_lite.training.seed_model import (
    add_lora,
    compute_dtype,
    hidden_states,
    lm_head_weight,
    load_adapter,
    load_seed,
    pick_dtype,
)

plain_families = pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    spm = make_spm(folder / "spm", make_sentences())
    return {family: make_family(folder / family, spm, family) for family in FAMILIES}


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_the_cpu_computes_in_float32_unless_asked(seeds):
    model, _ = load_seed(seeds["llama"], False)
    assert compute_dtype(model) == torch.float32
    model, _ = load_seed(seeds["llama"], False, precision="bfloat16")
    assert compute_dtype(model) == torch.bfloat16
    for precision, words in (("float16", "needs a GPU"), ("int8", "must be one of")):
        with pytest.raises(ValueError, match=words):
            load_seed(seeds["llama"], False, precision=precision)


def test_a_seed_comes_in_4_bits_with_a_padding_token(seeds):
    model, tokenizer = load_seed(seeds["llama"], backend="transformers")
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds == {"Linear4bit"}
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert tokenizer.pad_token_id is not None and tokenizer.padding_side == "right"


def test_an_unknown_backend_is_refused(seeds):
    with pytest.raises(ValueError, match="'jax'"):
        load_seed(seeds["llama"], backend="jax")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_unsloth_without_cuda_is_refused_with_a_way_out(seeds):
    with pytest.raises(RuntimeError, match="backend='transformers'"):
        load_seed(seeds["llama"], backend="unsloth")


@plain_families
@pytest.mark.parametrize("in_4bit", [True, False])
def test_lora_is_on_every_linear_layer_of_the_blocks_and_nothing_else_is_trained(seeds, family, in_4bit):
    model, _ = load_seed(seeds[family], in_4bit, backend="transformers")
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
    model = add_lora(load_seed(seeds["llama"], False, backend="transformers")[0], rank=4, alpha=12)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape[0] == 4 and layer.scaling["default"] == 3


def test_the_same_seed_gives_the_same_adapter(seeds):
    first, second = (
        add_lora(load_seed(seeds["llama"], False, backend="transformers")[0], seed=7).state_dict() for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first if "lora_A" in name)


@plain_families
def test_a_fresh_adapter_changes_nothing(seeds, family, batch):
    model, _ = load_seed(seeds[family], backend="transformers")
    with torch.no_grad():
        before = model(*batch).logits
        after = add_lora(model).eval()(*batch).logits
    torch.testing.assert_close(real(after, batch[1]), real(before, batch[1]), rtol=0, atol=1e-6)


@plain_families
def test_hidden_states_are_those_before_the_vocabulary_projection(seeds, family, batch):
    model, _ = load_seed(seeds[family], False, backend="transformers")
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
        model, _ = load_seed(seeds["llama"], backend="transformers")
        model = add_lora(model, gradient_checkpointing=checkpointing).train()
        (hidden_states(model, *batch) * direction).sum().backward()
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        )
    assert all(gradient.isfinite().all() for gradient in gradients[0].values())
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients)


def test_a_soft_capped_vocabulary_projection_is_refused(seeds):
    model, _ = load_seed(seeds["gemma2"], False, backend="transformers")
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        lm_head_weight(model)


def test_a_vocabulary_projection_with_a_bias_is_refused(seeds):
    model, _ = load_seed(seeds["llama"], False, backend="transformers")
    model.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(384))
    with pytest.raises(ValueError, match="a bias"):
        lm_head_weight(model)


def test_a_saved_adapter_gives_the_same_model_back(seeds, batch, tmp_path):
    model = add_lora(load_seed(seeds["llama"], backend="transformers")[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        expected = model.eval()(*batch).logits
        model.save_pretrained(tmp_path)
        loaded = load_adapter(load_seed(seeds["llama"], backend="transformers")[0], tmp_path)
        ours = loaded(*batch).logits
    assert not loaded.training
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_judging_with_a_4_bit_seed_changes_no_later_gradient(seeds, batch):
    """On some CPUs bitsandbytes repacks weights at their first evaluation and loses gradients."""
    direction = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for judged in (False, True):
        model = add_lora(load_seed(seeds["llama"], backend="transformers")[0])
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
