import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import make_family, make_sentences, make_spm
from transformers import AutoModelForCausalLM, LlamaTokenizer

from tract_lite import merge
from tract_lite.merge import merge_adapter
from tract_lite.prompt import make_spec
from tract_lite.scale import ScoreScale
from tract_lite.seed import load_adapter, load_seed
from tract_lite.spec import JudgeSpec

FAMILIES = ("llama", "qwen2", "phi3")
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"o_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {r"layers\.0\..*down_proj": 5, "down_proj": 40, "proj": 99, "o_proj": 7},
    },
    "rslora with patterns": {
        "use_rslora": True,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"o_proj": 1},
    },
}


def base_model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(seed: Path, folder: Path, **options) -> Path:
    """An adapter with random weights, none zero, on all linear layers."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **options
    )
    model = get_peft_model(base_model(seed), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer = LlamaTokenizer.from_pretrained(seed)
    make_spec(tokenizer, ScoreScale.integers(1, 5)).save(folder)
    return folder


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return make_spm(tmp_path_factory.mktemp("merge") / "spm", make_sentences())


@pytest.fixture(scope="module")
def seeds(spm):
    return {family: make_family(spm.parent / family, spm, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def adapters(seeds, spm):
    return {
        family: make_adapter(seed, spm.parent / f"{family}-adapter")
        for family, seed in seeds.items()
    }


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    ids = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    return model.eval()(ids).logits


def farthest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the spread of `b`."""
    return ((a - b).abs().max() / b.std()).item()


def assert_merged_like_peft(seed: Path, adapter: Path, merged: Path) -> None:
    expected = PeftModel.from_pretrained(base_model(seed), adapter).merge_and_unload().state_dict()
    found = base_model(merged).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_onto_16_bits_is_that_of_peft(seeds, adapters, tmp_path, family):
    merged = merge_adapter(seeds[family], adapters[family], tmp_path / "merged", base="16bit")
    assert_merged_like_peft(seeds[family], adapters[family], merged)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scales_and_patterns_are_read_as_by_peft(seeds, tmp_path, variant):
    adapter = make_adapter(seeds["llama"], tmp_path / "adapter", **VARIANTS[variant])
    merged = merge_adapter(seeds["llama"], adapter, tmp_path / "merged", base="16bit")
    assert_merged_like_peft(seeds["llama"], adapter, merged)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_onto_4_bits_gives_the_judge_that_was_trained(seeds, adapters, tmp_path, family):
    trained = load_adapter(load_seed(seeds[family], backend="transformers")[0], adapters[family])
    expected = logits_of(trained)
    merged = merge_adapter(seeds[family], adapters[family], tmp_path / "merged")
    ours = farthest(logits_of(base_model(merged)), expected)
    on_16_bits = merge_adapter(seeds[family], adapters[family], tmp_path / "other", base="16bit")
    theirs = farthest(logits_of(base_model(on_16_bits)), expected)
    # Both compute in float32: what is left is the order of sums. 4 bits themselves cost far more.
    assert ours < 1e-4 < 1e-1 < theirs


def test_a_seed_saved_in_4_bits_merges_too(seeds, adapters, tmp_path):
    model, tokenizer = load_seed(seeds["llama"], backend="transformers")
    seed = tmp_path / "llama"
    model.save_pretrained(seed)
    tokenizer.save_pretrained(seed)
    assert any(name.endswith("absmax") for name in load_file(seed / "model.safetensors"))
    expected = logits_of(
        load_adapter(load_seed(seed, backend="transformers")[0], adapters["llama"])
    )
    merged = merge_adapter(seed, adapters["llama"], tmp_path / "merged")
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert farthest(logits_of(base_model(merged)), expected) < 1e-4


def test_16_bit_tensors_stay_16_bit_and_are_rounded_once(seeds, adapters, tmp_path):
    seed = tmp_path / "llama"
    shutil.copytree(seeds["llama"], seed)
    AutoModelForCausalLM.from_pretrained(seed, dtype=torch.bfloat16).save_pretrained(seed)
    merged = base_model(merge_adapter(seed, adapters["llama"], tmp_path / "merged", base="16bit"))
    exact = PeftModel.from_pretrained(base_model(seed), adapters["llama"]).merge_and_unload()
    stored = load_file(next((tmp_path / "merged").glob("*.safetensors")))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, weight in exact.state_dict().items():
        torch.testing.assert_close(
            merged.state_dict()[name], weight.bfloat16().float(), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("base", ["4bit", "16bit"])
def test_shards_load_back(seeds, adapters, tmp_path, monkeypatch, base):
    whole = merge_adapter(seeds["llama"], adapters["llama"], tmp_path / "whole", base=base)
    monkeypatch.setattr(merge, "SHARD_BYTES", 50_000)
    shards = merge_adapter(seeds["llama"], adapters["llama"], tmp_path / "shards", base=base)
    assert len(list(shards.glob("*.safetensors"))) > 3 and not list(shards.glob("*.tmp"))
    expected = base_model(whole).state_dict()
    found = base_model(shards).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_seed_in_shards_merges_too(seeds, adapters, tmp_path):
    seed = tmp_path / "llama"
    shutil.copytree(seeds["llama"], seed, ignore=shutil.ignore_patterns("*.safetensors"))
    base_model(seeds["llama"]).save_pretrained(seed, max_shard_size="100KB")
    assert len(list(seed.glob("*.safetensors"))) > 2
    merged = merge_adapter(seed, adapters["llama"], tmp_path / "merged", base="16bit")
    assert_merged_like_peft(seed, adapters["llama"], merged)


def test_tied_embeddings_stay_tied(spm, tmp_path):
    seed = make_family(tmp_path / "tied", spm, "llama", tie_word_embeddings=True)
    adapter = make_adapter(seed, tmp_path / "adapter")
    for base in ("16bit", "4bit"):
        folder = merge_adapter(seed, adapter, tmp_path / base, base=base)
        merged = base_model(folder)
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        assert torch.equal(merged.lm_head.weight, base_model(seed).lm_head.weight)
        names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
        assert "lm_head.weight" not in names
    assert_merged_like_peft(seed, adapter, tmp_path / "16bit")


def test_tokenizer_files_are_copied_byte_for_byte_and_the_spec_comes_along(
    seeds, adapters, tmp_path
):
    merged = merge_adapter(seeds["llama"], adapters["llama"], tmp_path / "merged")
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (merged / name).read_bytes() == (seeds["llama"] / name).read_bytes()
    assert JudgeSpec.load(merged) == JudgeSpec.load(adapters["llama"])


def test_an_adapter_of_another_seed_is_refused_and_nothing_is_written(seeds, adapters, tmp_path):
    with pytest.raises(ValueError, match="was trained on .*qwen2"):
        merge_adapter(seeds["llama"], adapters["qwen2"], tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_an_adapter_on_weights_the_seed_lacks_is_refused(spm, adapters, tmp_path):
    seed = make_family(tmp_path / "llama", spm, "llama", layers=1)
    with pytest.raises(ValueError, match=r"the seed lacks: .*layers\.1\."):
        merge_adapter(seed, adapters["llama"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_unknown_base_is_refused(seeds, adapters, tmp_path):
    with pytest.raises(ValueError, match="'8bit'"):
        merge_adapter(seeds["llama"], adapters["llama"], tmp_path, base="8bit")


def test_a_merge_takes_the_place_of_an_older_one(seeds, adapters, tmp_path):
    out = tmp_path / "merged"
    out.mkdir()
    (out / "stale.safetensors").write_bytes(b"old")
    merge_adapter(seeds["llama"], adapters["llama"], out)
    assert not (out / "stale.safetensors").exists() and logits_of(base_model(out)).isfinite().all()
