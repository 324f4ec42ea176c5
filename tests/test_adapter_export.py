"""Adapters alone as GGUF: one base file is each of their judges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from judges import base_model, llama_logits, make_adapter, make_wide_judge, score_ids, torch_logits
from peft import PeftModel
from tiny import make_family, vocabulary_folder

from tract_lite.engines.llama import LlamaEngine
from tract_lite.engines.llama_cpp import load_adapter, load_model, quiet_llama, read_spec
from tract_lite.export.adapter import OTHERWISE
from tract_lite.export.gguf import export_adapter, export_gguf
from tract_lite.export.merge import merge_adapter
from tract_lite.judge import Judge
from tract_lite.record import Record
from tract_lite.spec import SPEC_FILE, JudgeSpec

pytestmark = pytest.mark.export

NAMES = ("adapter", "other")


@pytest.fixture(scope="module")
def adapters(shared_once):
    """A base without a spec, and two adapters on it as folders and as GGUF, unlike in all ways."""
    seed = shared_once("adapters_seed", lambda out: make_family(out, vocabulary_folder("spm"), "llama"))

    def make(folder: Path) -> None:
        ways = {"use_rslora": True, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 5}}
        first, second = make_adapter(seed, folder / NAMES[0]), make_adapter(seed, folder / NAMES[1], **ways)
        spec = json.loads(JudgeSpec.load(second).to_json()) | {"template": "{{ response }}"}
        JudgeSpec.from_json(json.dumps(spec)).save(second)
        for path in (first, second):
            export_adapter(path, seed, folder / f"{path.name}.gguf", check=path is first)
        export_gguf(seed, folder / "base.gguf", "f32")

    folder = shared_once("adapters_alone", make)
    folders, files = [folder / name for name in NAMES], [folder / f"{name}.gguf" for name in NAMES]
    return SimpleNamespace(seed=seed, base=folder / "base.gguf", folders=folders, files=files)


def test_one_base_with_adapters_in_turn_is_each_judge(adapters, tmp_path):
    ids = score_ids(JudgeSpec.load(adapters.folders[0]))
    first, second, first_again, none = llama_logits(adapters.base, ids, *adapters.files, adapters.files[0], None)
    for folder, found in zip(adapters.folders, (first, second)):
        merged = merge_adapter(adapters.seed, folder, tmp_path / folder.name, base="16bit")
        expected = torch_logits(base_model(merged), ids)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert np.array_equal(first, first_again) and np.abs(first - second).max() > 0.1
    np.testing.assert_allclose(none, torch_logits(base_model(adapters.seed), ids), atol=1e-3)


def test_the_spec_travels_with_the_adapter_and_not_with_the_base(adapters):
    model = load_model(adapters.base)
    specs = [load_adapter(model, file)[1] for file in adapters.files]
    quiet_llama().llama_model_free(model)
    assert specs == [JudgeSpec.load(folder) for folder in adapters.folders]
    assert specs[0] != specs[1] and read_spec(adapters.base) is None
    with pytest.raises(ValueError, match="holds no judge spec"):
        LlamaEngine(adapters.base)


def test_an_adapter_does_not_go_on_another_base(adapters, shared_once):
    model = load_model(shared_once("wide_judge", make_wide_judge) / "out" / "judge-3.2-f32")
    for path, reason in ((adapters.files[0], "another seed"), (adapters.base, "no LoRA adapter")):
        with pytest.raises(ValueError, match=reason):
            load_adapter(model, path)
    quiet_llama().llama_model_free(model)


def test_an_adapter_that_replaces_weights_is_to_be_merged(adapters, tmp_path):
    adapter = make_adapter(adapters.seed, tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"whole weights \(lm_head.weight\).*\n.*use merge_adapter"):
        export_adapter(adapter, adapters.seed, tmp_path / "adapter.gguf")
    export_gguf(merge_adapter(adapters.seed, adapter, tmp_path / "merged"), tmp_path / "judge.gguf", "f32")


@pytest.mark.parametrize(
    "options, kind",
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "LoRA on embeddings or head (lm_head."),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on embeddings or head (model.embed_tokens."),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "biases (model.layers.0."),
        ({"use_dora": True}, "DoRA (model.layers.0."),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, "embeddings of single tokens (model.embed_tokens."),
    ],
    ids=["head", "embeddings", "biases", "dora", "tokens"],
)
def test_what_is_refused_alone_and_merged_has_one_way_out_that_leads_there(adapters, tmp_path, options, kind):
    adapter = make_adapter(adapters.seed, tmp_path / "adapter", **options)
    refusals = []
    for refused in (
        lambda: export_adapter(adapter, adapters.seed, tmp_path / "adapter.gguf"),
        lambda: merge_adapter(adapters.seed, adapter, tmp_path / "merged", base="16bit"),
    ):
        with pytest.raises(ValueError) as refusal:
            refused()
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1] and kind in refusals[0]
    assert refusals[0].endswith(OTHERWISE)


def test_the_way_out_of_a_refused_adapter_gives_its_judge(adapters, tmp_path):
    adapter = make_adapter(adapters.seed, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    expected = PeftModel.from_pretrained(base_model(adapters.seed), adapter)
    ids = score_ids(JudgeSpec.load(adapter))
    logits = torch_logits(expected, ids)
    folder = tmp_path / "by peft"
    expected.merge_and_unload().save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(adapters.seed / name, folder)
    shutil.copy(adapter / SPEC_FILE, folder)
    file = export_gguf(folder, tmp_path / "judge.gguf", "f32")
    np.testing.assert_allclose(llama_logits(file, ids)[0], logits, rtol=0, atol=1e-3)
    assert read_spec(file) == JudgeSpec.load(adapter)


def test_an_adapter_is_exported_for_its_own_seed_alone(adapters, tmp_path):
    other = make_family(tmp_path / "seed", vocabulary_folder("spm"), "llama", seed=9)
    with pytest.raises(ValueError, match="was trained on"):
        export_adapter(adapters.folders[0], other, tmp_path / "adapter.gguf")
    assert list(tmp_path.iterdir()) == [other]


def test_one_judge_goes_from_adapter_to_adapter_without_another_base(adapters):
    first, second = adapters.files
    record = Record(prompt="The answer is short.")
    options = {"threads": 1, "parallel": 2}
    with Judge.from_gguf(adapters.base, adapter=second, **options) as judge:
        expected = judge.score(record).probabilities
    with Judge.from_gguf(adapters.base, JudgeSpec.load(adapters.folders[0]), **options) as judge:
        assert judge.spec == JudgeSpec.load(adapters.folders[0])
        (bare,) = judge.score_many([record], reasonings=[[[5, 6]]])
        judge.use_adapter(first)
        (changed,) = judge.score_many([record], reasonings=[[[5, 6]]])
        assert bare.probabilities and bare.probabilities != changed.probabilities
        judge.use_adapter(second)
        assert judge.spec == JudgeSpec.load(adapters.folders[1])
        assert judge.score(record).probabilities == expected
        with pytest.raises(ValueError, match="no LoRA adapter"):
            judge.use_adapter(adapters.base)
        assert judge.score(record).probabilities == expected


def test_a_running_judge_keeps_its_adapter(adapters):
    record = Record(prompt="The answer is short.")
    first, second = adapters.files
    with Judge.from_gguf(adapters.base, adapter=second, threads=1, parallel=1) as judge:
        running = judge.score_many([record, record, record])
        next(running)
        with pytest.raises(RuntimeError, match="inside a run"):
            judge.use_adapter(first)
        assert len(list(running)) == 2
