"""Each architecture from adapter to GGUF: merged folder and file give the same logits."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from judges import OPTIONS, base_model, llama_logits, make_adapter, score_ids, torch_logits
from tiny import BYTE_LEVEL, REAL, SHARED, export_judge, make_family, make_gemma_spm, make_phi_spm, vocabulary_folder
from transformers import AutoTokenizer

from tract_lite.data.records import read_records
from tract_lite.engines.llama_cpp import load_model, quiet_llama
from tract_lite.export.gguf import export_gguf
from tract_lite.export.merge import merge_adapter
from tract_lite.export.parity import check_export
from tract_lite.prompt import prompt_ids
from tract_lite.record import Record
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import GGUFVocabulary, TransformersVocabulary

pytestmark = pytest.mark.export

# Of each architecture, a vocabulary of its kind.
MADE = {"mistral": make_phi_spm, "gemma2": make_gemma_spm, "phi3": make_phi_spm}
TRAINED = {
    "llama": "merged digits",
    "mistral": "phi",
    "qwen2": "split digits",
    "qwen3": "space and digit",
    "gemma2": "gemma",
    "phi3": "phi",
}
# The real ones, where they are, make most of a small model.
KNOWN = {"llama": "llama-bpe", "mistral": "llama-spm", "qwen2": "qwen2", "qwen3": "gpt-2"}
SMALL = {"hidden_size": 32, "head_dim": 8, "tie_word_embeddings": True}
# With larger weights, llama.cpp's table of GELU in 16 bits shows.
SIZES = {"gemma2": {"std": 0.05}}
CASES = [pytest.param(case, id=case[0]) for case in TRAINED.items()]
REAL_CASES = [
    pytest.param(case, id=f"real {case[1]}", marks=pytest.mark.long) for case in KNOWN.items() if case[1] in REAL
]


def make_export(family: str, name: str, folder: Path) -> None:
    """A random seed model, a random adapter on it, both merged, and the GGUF file in float32."""
    made = family in MADE and name not in REAL
    vocabulary = MADE[family](folder / "vocabulary") if made else vocabulary_folder(name)
    options = {**OPTIONS.get(family, {}), **SIZES.get(family, {}), **(SMALL if name in REAL else {})}
    seed_model = make_family(folder / "seed", vocabulary, family, **options)
    for unused in seed_model.glob("*.gguf"):
        unused.unlink()
    merged = merge_adapter(seed_model, make_adapter(seed_model, folder / "adapter"), folder / "merged", base="16bit")
    if name in BYTE_LEVEL:
        export_judge(name, merged, folder / "judge.gguf")
    else:
        export_gguf(merged, folder / "judge.gguf", "f32", check=False)


@pytest.fixture(scope="module", params=CASES + REAL_CASES)
def export(request, shared_once):
    """A merged judge of each architecture, and its GGUF file in float32."""
    family, name = request.param
    folder = shared_once(f"export_{family}_{name}".replace(" ", "_"), lambda out: make_export(family, name, out))
    tokenizer, spec = AutoTokenizer.from_pretrained(folder / "merged"), JudgeSpec.load(folder / "merged")
    return SimpleNamespace(merged=folder / "merged", gguf=folder / "judge.gguf", tokenizer=tokenizer, spec=spec)


def test_gguf_and_merged_folder_give_the_same_logits_at_the_score(export):
    ids = score_ids(export.spec)
    expected = torch_logits(base_model(export.merged), ids)
    (found,) = llama_logits(export.gguf, ids)
    assert len(found) == len(expected) and expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_the_gate_passes_what_is_the_same(export, caplog):
    caplog.set_level(logging.INFO)
    files = {"f32": export.gguf}
    figures = check_export(export.spec, export.tokenizer, export.merged, files, weights=0)["f32"]
    assert figures.mean_distance <= 0.001
    assert figures.records == 5 and figures.different_prompts == 0
    assert figures.largest_difference <= 0.001
    assert "the ids of 5 prompts" in caplog.text and "f32: 5 records" in caplog.text


@pytest.mark.parametrize("export", REAL_CASES, indirect=True)
def test_ids_of_real_prompts_are_the_same_on_both_sides(export):
    real = read_records(SHARED / "data" / "vicuna_eval.json")
    feedbacks = [pair.feedback for record in real for pair in record.pairs()[:1]]
    records = [*real, *(Record(prompt=feedback) for feedback in feedbacks)]
    assert len({record.prompt for record in records}) >= 500
    theirs = TransformersVocabulary(export.tokenizer)
    model = load_model(export.gguf, vocab_only=True)
    ours = GGUFVocabulary(model)
    differing = [
        record.prompt
        for record in records
        if prompt_ids(record, export.spec, ours) != prompt_ids(record, export.spec, theirs)
    ]
    quiet_llama().llama_model_free(model)
    assert differing == []
