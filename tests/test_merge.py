"""An adapter on its seed model to a plain folder: the weights are as in peft; what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from judges import adapters_on, base_model, make_adapter, seed_models
from peft import PeftModel
from safetensors.torch import load_file, save_file
from stages import load_exact
from tiny import FAMILIES, load_tokenizer, make_family, vocabulary_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tract_lite.data.places import content_of
from tract_lite.export import merge
from tract_lite.export.merge import merge_adapter
from tract_lite.spec import JudgeSpec
from tract_lite.training.seed_model import load_adapter

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"o_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {r"layers\.0\..*down_proj": 5, "down_proj": 40, "proj": 99, "o_proj": 7},
    },
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"o_proj": 1}},
}


@pytest.fixture(scope="module")
def spm():
    return vocabulary_folder("spm")


@pytest.fixture(scope="module")
def seeds(shared_once):
    return seed_models(shared_once)


@pytest.fixture(scope="module")
def adapters(seeds, shared_once):
    return adapters_on(seeds, shared_once)


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


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_a_merge_onto_4_bits_gives_the_judge_that_was_trained(seeds, adapters, tmp_path, family):
    trained = load_adapter(load_exact(seeds[family], in_4bit=True)[0], adapters[family])
    expected = logits_of(trained)
    merged = merge_adapter(seeds[family], adapters[family], tmp_path / "merged")
    ours = farthest(logits_of(base_model(merged)), expected)
    on_16_bits = merge_adapter(seeds[family], adapters[family], tmp_path / "other", base="16bit")
    theirs = farthest(logits_of(base_model(on_16_bits)), expected)
    # Both compute in float32: what is left is the order of sums. 4 bits themselves cost far more.
    assert ours < 1e-4 < 1e-1 < theirs


@pytest.fixture
def four_bits(seeds, tmp_path):
    """The Llama seed as bitsandbytes saves it."""
    model, tokenizer = load_exact(seeds["llama"], in_4bit=True)
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_seed_saved_in_4_bits_merges_too(four_bits, adapters, tmp_path):
    assert any(name.endswith("absmax") for name in load_file(four_bits / "model.safetensors"))
    expected = logits_of(load_adapter(load_exact(four_bits, in_4bit=True)[0], adapters["llama"]))
    merged = merge_adapter(four_bits, adapters["llama"], tmp_path / "merged")
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert farthest(logits_of(base_model(merged)), expected) < 1e-4


def test_layers_that_a_4_bit_seed_keeps_in_16_bits_are_merged_as_they_are(seeds, adapters, tmp_path):
    skipped = "model.layers.0.mlp"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", skipped],
    )
    model = AutoModelForCausalLM.from_pretrained(seeds["llama"], quantization_config=config)
    seed = tmp_path / "llama"
    model.save_pretrained(seed)
    AutoTokenizer.from_pretrained(seeds["llama"]).save_pretrained(seed)
    expected = logits_of(load_adapter(load_exact(seed, in_4bit=True)[0], adapters["llama"]))
    merged = merge_adapter(seed, adapters["llama"], tmp_path / "merged")
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
        torch.testing.assert_close(merged.state_dict()[name], weight.bfloat16().float(), rtol=0, atol=1e-6)


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


def test_an_adapter_is_merged_onto_weights_as_it_was_trained_on(seeds, adapters, tmp_path):
    spec = JudgeSpec.load(adapters["llama"])
    layer, found = "model.layers.0.mlp.up_proj.weight", {}
    for in_4bit in (None, True, False):
        adapter = shutil.copytree(adapters["llama"], tmp_path / f"adapter {in_4bit}")
        replace(spec, method={} if in_4bit is None else {"load_in_4bit": in_4bit}).save(adapter)
        for base in ("4bit", "16bit"):
            merged = merge_adapter(seeds["llama"], adapter, tmp_path / f"{base} {in_4bit}", base=base)
            found[base, in_4bit] = base_model(merged).state_dict()[layer]
    own = found["16bit", True]
    assert all(torch.equal(found[how], own) for how in (("16bit", None), ("16bit", False), ("4bit", False)))
    assert torch.equal(found["4bit", None], found["4bit", True]) and not torch.equal(found["4bit", True], own)


def test_types_may_be_mixed_within_a_shard(seeds, adapters, tmp_path):
    seed = tmp_path / "seed"
    shutil.copytree(seeds["llama"], seed)
    tensors = load_file(seed / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    # In the file's order, a float32 tensor would lie at an odd multiple of two bytes.
    mixed = {"a.odd": torch.ones(3, dtype=torch.bfloat16)}
    mixed |= {name: t if name == norm else t.bfloat16() for name, t in tensors.items()}
    save_file(mixed, seed / "model.safetensors", {"format": "pt"})
    merge_adapter(seed, adapters["llama"], tmp_path / "merged", base="16bit")
    (shard,) = (tmp_path / "merged").glob("*.safetensors")
    merged = load_file(shard)
    assert {name: t.dtype for name, t in merged.items()} == {n: t.dtype for n, t in mixed.items()}
    for name in ("a.odd", norm, "model.embed_tokens.weight"):
        assert torch.equal(merged[name], mixed[name])


def test_weights_of_a_type_that_is_not_known_are_refused(seeds, adapters, tmp_path):
    seed = tmp_path / "seed"
    shutil.copytree(seeds["llama"], seed)
    tensors = load_file(seed / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, seed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"float8_e4m3fn \(model\.norm\.weight\)"):
        merge_adapter(seed, adapters["llama"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


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


def test_tokenizer_files_are_copied_byte_for_byte_and_the_spec_comes_along(seeds, adapters, tmp_path):
    merged = merge_adapter(seeds["llama"], adapters["llama"], tmp_path / "merged")
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (merged / name).read_bytes() == (seeds["llama"] / name).read_bytes()
    assert JudgeSpec.load(merged) == JudgeSpec.load(adapters["llama"])


def test_an_adapter_of_another_seed_is_refused_and_nothing_is_written(seeds, adapters, tmp_path):
    with pytest.raises(ValueError, match="was trained on .*qwen2"):
        merge_adapter(seeds["llama"], adapters["qwen2"], tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def renamed(adapter: Path, folder: Path, base: str) -> Path:
    """A copy of an adapter that says it was trained on another seed."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("layers, reason", [(1, r"the seed model lacks: .*layers\.1\."), (2, "shapes")])
def test_an_adapter_that_does_not_fit_is_refused(spm, adapters, tmp_path, layers, reason):
    seed = make_family(tmp_path / "llama", spm, "llama", layers=layers, intermediate_size=144)
    adapter = renamed(adapters["llama"], tmp_path / "adapter", "/long/gone/llama")
    with pytest.raises(ValueError, match=reason):
        merge_adapter(seed, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "adapter"}


def test_a_seed_may_move_but_not_change(seeds, adapters, spm, tmp_path):
    moved = shutil.copytree(seeds["llama"], tmp_path / "elsewhere")
    merge_adapter(moved, adapters["llama"], tmp_path / "merged")
    other = make_family(tmp_path / "llama", spm, "llama", seed=5)
    with pytest.raises(ValueError, match="was trained on .*, not on"):
        merge_adapter(other, adapters["llama"], tmp_path / "other")


def test_a_seed_of_another_name_is_known_by_the_content_that_its_training_kept(seeds, adapters, spm, tmp_path):
    adapter = renamed(adapters["llama"], tmp_path / "adapter", "/long/gone/other name")
    seed = shutil.copytree(seeds["llama"], tmp_path / "now this name")
    spec = JudgeSpec.load(adapter)
    replace(spec, method={"seed_model_sha256": content_of(seed)}).save(adapter)
    merge_adapter(seed, adapter, tmp_path / "merged")
    other = make_family(tmp_path / "llama", spm, "llama", seed=5)
    with pytest.raises(ValueError, match="was trained on /long/gone/other name, not on"):
        merge_adapter(other, adapter, tmp_path / "other")


@pytest.mark.parametrize(
    "base",
    [
        "/long/gone/elsewhere",
        "nobody/elsewhere-bnb-4bit",
        "nobody/elsewhere-unsloth-bnb-4bit",
        "nobody/Meta-Elsewhere",
        "nobody/Elsewhere-hf",
    ],
)
def test_a_seed_out_of_reach_is_known_by_its_name(seeds, adapters, tmp_path, monkeypatch, base):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapter = renamed(adapters["llama"], tmp_path / "adapter", base)
    with pytest.raises(ValueError, match="let its folder have that name"):
        merge_adapter(seeds["llama"], adapter, tmp_path / "merged")
    for place in ("Elsewhere", "hub/models--nobody--elsewhere/snapshots/0a1b2c"):
        moved = shutil.copytree(seeds["llama"], tmp_path / place)
        merge_adapter(moved, adapter, tmp_path / "merged")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "norm"]])
def test_modules_to_save_take_the_seeds_place_and_untie_as_in_peft(spm, tmp_path, tied, saved):
    seed = make_family(tmp_path / "seed", spm, "llama", tie_word_embeddings=tied)
    adapter = make_adapter(seed, tmp_path / "adapter", modules_to_save=saved)
    merged = merge_adapter(seed, adapter, tmp_path / "merged", base="16bit")
    assert_merged_like_peft(seed, adapter, merged)
    peft = PeftModel.from_pretrained(base_model(seed), adapter).merge_and_unload()
    torch.testing.assert_close(logits_of(base_model(merged)), logits_of(peft), rtol=0, atol=1e-3)
    assert not peft.config.tie_word_embeddings
    assert not base_model(merged).config.tie_word_embeddings


def test_embeddings_that_peft_keeps_tied_stay_tied(spm, tmp_path):
    seed = make_family(tmp_path / "seed", spm, "llama", tie_word_embeddings=True)
    adapter = make_adapter(seed, tmp_path / "adapter", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    merged = merge_adapter(seed, adapter, tmp_path / "merged", base="16bit")
    assert_merged_like_peft(seed, adapter, merged)
    assert base_model(merged).config.tie_word_embeddings


def test_what_is_not_lora_on_linear_layers_is_refused(seeds, tmp_path):
    adapter = make_adapter(seeds["llama"], tmp_path / "adapter", use_dora=True)
    with pytest.raises(ValueError, match="lora_magnitude_vector"):
        merge_adapter(seeds["llama"], adapter, tmp_path / "merged")
    with pytest.raises(ValueError, match="not an adapter"):
        merge_adapter(seeds["llama"], seeds["llama"], tmp_path / "merged")
    with pytest.raises(ValueError, match=f"{tmp_path} is not an adapter: .*; {adapter} is one"):
        merge_adapter(seeds["llama"], tmp_path, tmp_path / "merged")


def test_biases_that_an_adapter_trains_are_refused_with_a_way_out(seeds, tmp_path):
    adapter = make_adapter(seeds["qwen2"], tmp_path / "adapter", load_tokenizer("spm"), bias="lora_only")
    with pytest.raises(ValueError, match=r"trains biases \(.*k_proj.*\n.*merge_and_unload"):
        merge_adapter(seeds["qwen2"], adapter, tmp_path / "merged")


def test_an_adapter_without_a_spec_is_refused(seeds, adapters, tmp_path):
    adapter = shutil.copytree(adapters["llama"], tmp_path / "adapter", ignore=shutil.ignore_patterns("judge_spec*"))
    with pytest.raises(ValueError, match="no judge spec"):
        merge_adapter(seeds["llama"], adapter, tmp_path / "merged")


def test_a_second_set_of_weights_in_the_seed_is_left_alone(seeds, adapters, tmp_path):
    seed = shutil.copytree(seeds["mistral"], tmp_path / "mistral")
    save_file({"layers.0.attention.wq.weight": torch.ones(4)}, seed / "consolidated.safetensors")
    merged = merge_adapter(seed, adapters["mistral"], tmp_path / "merged", base="16bit")
    assert_merged_like_peft(seeds["mistral"], adapters["mistral"], merged)


def test_the_original_weights_are_asked_for_where_the_seed_has_4_bits_alone(adapters, four_bits):
    with pytest.raises(ValueError, match="in 4 bits alone"):
        merge_adapter(four_bits, adapters["llama"], four_bits.parent / "merged", base="16bit")


def test_an_unknown_base_is_refused(seeds, adapters, tmp_path):
    with pytest.raises(ValueError, match="'8bit'"):
        merge_adapter(seeds["llama"], adapters["llama"], tmp_path, base="8bit")


def test_a_merge_takes_the_place_of_an_older_one(seeds, adapters, tmp_path):
    out = merge_adapter(seeds["llama"], adapters["llama"], tmp_path / "merged", base="16bit")
    (out / "stale.safetensors").write_bytes(b"old")
    merge_adapter(seeds["llama"], adapters["llama"], out)
    assert not (out / "stale.safetensors").exists() and logits_of(base_model(out)).isfinite().all()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", ["seed", "adapter", "notes"])
def test_a_folder_that_is_no_merge_is_never_replaced(seeds, adapters, tmp_path, name):
    out = {"seed": seeds["llama"], "adapter": adapters["llama"]}.get(name, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = sorted(out.iterdir())
    with pytest.raises(ValueError, match="holds other things"):
        merge_adapter(seeds["llama"], adapters["llama"], out)
    assert sorted(out.iterdir()) == before


@pytest.mark.parametrize("other", ["judge.gguf", "notes"])
def test_somebodys_work_beside_an_older_merge_is_kept(seeds, adapters, tmp_path, other):
    out = merge_adapter(seeds["llama"], adapters["llama"], tmp_path / "merged")
    (out / other).mkdir() if other == "notes" else (out / other).touch()
    with pytest.raises(ValueError, match="holds other things"):
        merge_adapter(seeds["llama"], adapters["llama"], out)
    assert (out / other).exists()


def test_a_seed_is_never_replaced_by_its_merge(adapters, seeds, tmp_path):
    seed = tmp_path / "llama"
    shutil.copytree(seeds["llama"], seed)
    shutil.copy(adapters["llama"] / "judge_spec.json", seed)
    with pytest.raises(ValueError, match="holds other things"):
        merge_adapter(seed, adapters["llama"], seed)


@pytest.mark.parametrize("change", [{"init_lora_weights": "pissa_niter_4"}, {"fan_in_fan_out": 1}])
def test_what_changed_the_seed_before_training_is_refused(seeds, adapters, tmp_path, change):
    adapter = tmp_path / "adapter"
    shutil.copytree(adapters["llama"], adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="only plain LoRA"):
        merge_adapter(seeds["llama"], adapter, tmp_path / "merged")


def test_a_copy_of_the_seed_in_other_types_is_the_same_seed(seeds, adapters, tmp_path):
    seed = tmp_path / "copy"
    shutil.copytree(seeds["llama"], seed)
    tensors = load_file(seed / "model.safetensors")
    for kind in (torch.float16, torch.bfloat16):
        save_file({n: t.to(kind) for n, t in tensors.items()}, seed / "model.safetensors")
        merge_adapter(seed, adapters["llama"], tmp_path / "merged", base="16bit")


def test_files_of_a_read_only_seed_are_copied_to_be_written(seeds, adapters, tmp_path):
    seed = tmp_path / "llama"
    shutil.copytree(seeds["llama"], seed)
    (seed / "config.json").chmod(0o444)
    merged = merge_adapter(seed, adapters["llama"], tmp_path / "merged")
    assert (merged / "config.json").stat().st_mode & 0o200


def test_no_room_on_the_disk_is_found_before_any_work(seeds, adapters, tmp_path, monkeypatch):
    needed = load_file(seeds["llama"] / "model.safetensors")
    size = sum(tensor.nbytes for tensor in needed.values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(RuntimeError, match="GB free: make room.*export_adapter"):
        merge_adapter(seeds["llama"], adapters["llama"], tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    merge_adapter(seeds["llama"], adapters["llama"], tmp_path / "merged")


# Importing is slow, so the killed ones are forks.
KILL = """
import os, shutil, signal, sys
from pathlib import Path
from tract_lite.export import merge

seed_model, adapter, out, copies = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])

def killed(owner, name, before):
    real, calls = getattr(owner, name), []
    def stop(*arguments):
        calls.append(arguments)
        if len(calls) > before:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    setattr(owner, name, stop)
    merge.merge_adapter(seed_model, adapter, out, base="16bit")

# In the middle of the weights, before the folder gets its name and, with an old merge in place,
# between its going and the coming of the new one.
for moment, where in {"weights": (merge, "_merged", 5), "done": (os, "replace", 0), "swap": (os, "replace", 1)}.items():
    child = os.fork()
    if not child:
        try:
            killed(*where)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not out.exists() and len(list(out.parent.iterdir())) == 1
    merge.merge_adapter(seed_model, adapter, out, base="16bit")
    assert list(out.parent.iterdir()) == [out]
    shutil.copytree(out, copies / moment)
    if moment == "weights":
        shutil.rmtree(out)
"""


def test_a_killed_merge_leaves_nothing_half_done_and_a_second_one_completes_it(seeds, adapters, tmp_path):
    arguments = [seeds["llama"], adapters["llama"], tmp_path / "out" / "merged", tmp_path / "copies"]
    done = subprocess.run([sys.executable, "-c", KILL, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for moment in ("weights", "done", "swap"):
        assert_merged_like_peft(seeds["llama"], adapters["llama"], tmp_path / "copies" / moment)
