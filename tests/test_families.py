"""Each family of seed models goes the whole way or is refused before it is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, ask, known_to_the_converter, make_seed, run_forked, table, whole_way
from safetensors.torch import load_file
from stages import SCALE
from tiny import REAL, SHARED, make_family, vocabulary_folder
from transformers import AutoTokenizer

from tract_lite.data.records import read_records
from tract_lite.export import converter
from tract_lite.export.converter import convert_model
from tract_lite.export.gguf import export_gguf
from tract_lite.export.parity import check_vocabulary
from tract_lite.record import Record
from tract_lite.spec import make_spec
from tract_lite.training.layers import linear_layers
from tract_lite.training.seed_model import add_lora, load_seed

# Real vocabularies, where they are, make most of a small model.
REAL_FAMILIES = {"llama-bpe": "llama", "llama-spm": "mistral", "qwen2": "qwen2", "gpt-2": "qwen3"}
SMALL = {"hidden_size": 32, "head_dim": 8, "tie_word_embeddings": True}
DOCS = Path(__file__).parents[1] / "docs" / "seeds.md"


def vision_of(folder: Path) -> dict[str, bytes]:
    """The weights that see, by name."""
    named = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: named[name].numpy().tobytes() for name in named if "visi" in name or "visual" in name}


@pytest.mark.export
@pytest.mark.training
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_the_whole_way_or_is_refused_before_it_is_trained(tmp_path, monkeypatch, name):
    monkeypatch.setattr(converter, "run_python", run_forked)
    family = FAMILIES[name]
    seed = make_seed(family, tmp_path / "seed")
    with known_to_the_converter(family):
        if family.refusal:
            with pytest.raises(ValueError, match=re.escape(family.refusal)) as refused:
                ask(seed)
            assert len(str(refused.value).splitlines()) == 2
            return
        ask(seed)
        parity, spread = whole_way(seed, tmp_path)
    (figures,) = json.loads((tmp_path / "parity.json").read_text()).values()
    assert vision_of(seed) == vision_of(tmp_path / "merged")
    assert bool(vision_of(seed)) == ("vision" in name)
    assert spread > 1e-3 and parity.records == 8
    assert parity.different_prompts == figures["different_prompts"] == 0
    assert parity.largest_difference <= family.within
    # With llama.cpp's own cache, which is in 16 bits.
    assert figures["largest_difference"] <= 2e-3 and figures["long_difference"] <= 2e-3


@pytest.mark.parametrize(
    "name, others",
    [
        ("Qwen3-MoE", set()),
        ("Gemma-3n", {"altup_projections", "altup_unembed_projections", "per_layer_model_projection"}),
        ("Gemma-4 with vision", {"vision_tower", "embed_vision", "per_layer_model_projection"}),
        ("Falcon-H1", {"in_proj", "out_proj"}),
    ],
)
def test_lora_is_on_the_linear_layers_of_the_text_models_blocks_alone(tmp_path, name, others):
    model, _ = load_seed(make_seed(FAMILIES[name], tmp_path / "seed"), False, backend="transformers")
    linear = {layer for layer, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    expected = {layer for layer in linear - {"lm_head"} if not others & set(layer.split("."))}
    assert set(linear_layers(model)) == expected and others <= {part for layer in linear for part in layer.split(".")}
    trained = [layer for layer, weight in add_lora(model).named_parameters() if weight.requires_grad]
    assert {layer.removeprefix("base_model.model.").partition(".lora_")[0] for layer in trained} == expected


@pytest.mark.export
def test_an_export_outlives_a_model_that_llama_cpp_ends_its_process_with(tmp_path):
    family = FAMILIES["Granite-4 with experts in use that it lacks"]
    seed = make_seed(family, tmp_path / "seed")
    make_spec(AutoTokenizer.from_pretrained(seed), SCALE).save(seed)
    with known_to_the_converter(family), pytest.raises(ValueError, match="llama.cpp ends the process"):
        export_gguf(seed, tmp_path / "out" / "judge.gguf", "f32", check=False)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.long
@pytest.mark.parametrize("vocabulary", REAL)
def test_a_file_with_a_real_vocabulary_reads_real_prompts_as_transformers_does(tmp_path, vocabulary):
    seed = make_family(tmp_path / "seed", vocabulary_folder(vocabulary), REAL_FAMILIES[vocabulary], **SMALL)
    tokenizer = AutoTokenizer.from_pretrained(seed)
    spec = make_spec(tokenizer, SCALE)
    real = read_records(SHARED / "data" / "vicuna_eval.json")
    feedbacks = [Record(prompt=pair.feedback) for record in real for pair in record.pairs()[:1]]
    convert_model(seed, tmp_path / "seed.gguf", "f32", spec)
    assert len(check_vocabulary(spec, tokenizer, tmp_path / "seed.gguf", [*real, *feedbacks])) >= 500


def test_the_page_of_seeds_has_what_was_tested():
    assert table() in DOCS.read_text(encoding="utf-8"), "write what `python tests/families.py` prints into it"
