"""From an adapter to GGUF for each architecture; adapters alone; kills, disk, network."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merge import OPTIONS, base_model, make_adapter
from tiny import FAMILIES, SHARED, make_family, make_gemma_spm, make_phi_spm, make_sentences, make_spm
from transformers import AutoTokenizer

from tract_lite.data.records import read_records
from tract_lite.engines.llama import LlamaEngine
from tract_lite.engines.llama_cpp import Context, load_adapter, load_model, quiet_llama, read_spec, set_adapter
from tract_lite.export import model_folder as disk, parity
from tract_lite.export.converter import llama_cpp_source
from tract_lite.export.gguf import export_adapter, export_gguf
from tract_lite.export.merge import merge_adapter
from tract_lite.export.parity import check_export
from tract_lite.judge import Judge
from tract_lite.prompt import prompt_ids
from tract_lite.record import Record
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import GGUFVocabulary, TransformersVocabulary

REAL = {"llama": "llama-bpe", "mistral": "llama-spm", "qwen2": "qwen2", "qwen3": "gpt-2"}
MADE = {"gemma2": make_gemma_spm, "phi3": make_phi_spm}
# With larger weights, llama.cpp's table of GELU in 16 bits shows.
SIZES = {"gemma2": {"std": 0.05}}
# A real vocabulary makes most of a small model.
SMALL = {"hidden_size": 32, "head_dim": 8, "tie_word_embeddings": True}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def make_judge(folder: Path, vocabulary: Path, family: str, **sizes) -> Path:
    """A random seed, a random adapter on it, and both merged."""
    options = {**OPTIONS.get(family, {}), **SIZES.get(family, {}), **sizes}
    seed = make_family(folder / "seed", vocabulary, family, **options)
    for unused in seed.glob("*.gguf"):
        unused.unlink()
    adapter = make_adapter(seed, folder / "adapter", AutoTokenizer.from_pretrained(seed))
    return merge_adapter(seed, adapter, folder / "merged", base="16bit")


@pytest.fixture(scope="module", params=FAMILIES)
def export(request, tmp_path_factory):
    """A merged judge of each architecture, and its GGUF file in float32."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    if family in REAL:
        if not SHARED.is_dir():
            pytest.skip("no real vocabularies here")
        vocabulary, sizes = SHARED / "tokenizers" / REAL[family], SMALL
    else:
        vocabulary, sizes = MADE[family](folder / "vocabulary"), {}
    merged = make_judge(folder, vocabulary, family, **sizes)
    gguf = export_gguf(merged, folder / "judge.gguf", "f32", check=False)
    tokenizer, spec = AutoTokenizer.from_pretrained(merged), JudgeSpec.load(merged)
    yield SimpleNamespace(family=family, merged=merged, gguf=gguf, tokenizer=tokenizer, spec=spec)
    shutil.rmtree(folder)


def llama_logits(gguf: Path, ids: list[int], *adapters: Path | None) -> list[np.ndarray]:
    """The logits after `ids`, without an adapter or after each of `adapters`, base loaded once."""
    model = load_model(gguf)
    context = Context(model, 1, 128, threads=1, flash_attention=False, cache_type="f32")
    found = []
    for adapter in adapters or [None]:
        set_adapter(context.pointer, adapter and load_adapter(model, adapter)[0])
        context.clear()
        context.decode(ids, range(len(ids)), [0] * len(ids), [len(ids) - 1])
        found.append(context.logits(0 if len(ids) == 1 else len(ids) - 1).copy())
    context.close()
    quiet_llama().llama_model_free(model)
    return found


@torch.no_grad()
def torch_logits(model, ids: list[int]) -> np.ndarray:
    return model(torch.tensor([ids])).logits[0, -1].float().numpy()


def score_ids(spec: JudgeSpec) -> list[int]:
    """Some tokens, and a judge's marker behind them."""
    ids = torch.randint(3, 300, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    return [*ids, *spec.marker_ids]


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


def test_figures_are_printed_where_no_log_takes_them(small, tmp_path, capsys):
    export_gguf(small, tmp_path / "judge.gguf", "f32")
    shown = capsys.readouterr().err
    assert "parity: f32: the ids of 5 prompts" in shown and "distributions by 0.00" in shown


def test_a_file_of_another_head_is_found_by_its_distributions(small, tmp_path):
    """The score of a random model hardly moves: its labels hold next to no probability."""
    tokenizer = AutoTokenizer.from_pretrained(small)
    other = shutil.copytree(small, tmp_path / "other")
    (file,) = other.glob("*.safetensors")
    weights = load_file(file)
    weights["lm_head.weight"] = weights["lm_head.weight"].flip(1).contiguous()
    save_file(weights, file, {"format": "pt"})
    file = export_gguf(other, tmp_path / "other.gguf", "f32", check=False)
    figures = check_export(JudgeSpec.load(small), tokenizer, small, {"f32": file}, weights=0)
    assert figures["f32"].mean_distance > 0.05


def test_ids_of_real_prompts_are_the_same_on_both_sides(export):
    if export.family not in REAL:
        pytest.skip("a small vocabulary")
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


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small judge, for what does not hang on the architecture."""
    folder = tmp_path_factory.mktemp("small")
    return make_judge(folder, make_spm(folder / "spm", make_sentences()), "llama")


@pytest.fixture(scope="module")
def adapters(small):
    """A base without a spec, and two adapters on it as folders and as GGUF, unlike in all ways."""
    seed, folder = small.parent / "seed", small.parent
    ways = {"use_rslora": True, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 5}}
    folders = [folder / "adapter", make_adapter(seed, folder / "other", **ways)]
    spec = json.loads(JudgeSpec.load(folders[1]).to_json()) | {"template": "{{ response }}"}
    JudgeSpec.from_json(json.dumps(spec)).save(folders[1])
    files = [export_adapter(path, seed, folder / f"{path.name}.gguf", check=path is folders[0]) for path in folders]
    base = export_gguf(seed, folder / "base.gguf", "f32")
    return SimpleNamespace(seed=seed, base=base, folders=folders, files=files)


def test_one_base_with_adapters_in_turn_is_each_judge(adapters):
    ids = score_ids(JudgeSpec.load(adapters.folders[0]))
    first, second, first_again, none = llama_logits(adapters.base, ids, *adapters.files, adapters.files[0], None)
    for folder, found in zip(adapters.folders, (first, second)):
        merged = merge_adapter(adapters.seed, folder, folder.parent / "again", base="16bit")
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


def test_an_adapter_does_not_go_on_another_base(adapters, export):
    model = load_model(export.gguf)
    for path, reason in ((adapters.files[0], "another seed"), (adapters.base, "no LoRA adapter")):
        with pytest.raises(ValueError, match=reason):
            load_adapter(model, path)
    quiet_llama().llama_model_free(model)


def test_an_adapter_that_replaces_weights_is_to_be_merged(adapters, tmp_path):
    adapter = make_adapter(adapters.seed, tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head.*use merge_adapter"):
        export_adapter(adapter, adapters.seed, tmp_path / "adapter.gguf")


def test_an_adapter_is_exported_for_its_own_seed_alone(adapters, tmp_path):
    spm = adapters.seed.parent / "spm"
    other = make_family(tmp_path / "seed", spm, "llama", seed=9)
    with pytest.raises(ValueError, match="was trained on"):
        export_adapter(adapters.folders[0], other, tmp_path / "adapter.gguf")
    assert list(tmp_path.iterdir()) == [other]


def test_a_file_that_reads_other_tokens_does_not_get_its_name(small, tmp_path):
    # The converter writes Gemma's vocabulary without a space before a text, and this one has it.
    folder = make_family(tmp_path / "gemma2", small.parent / "spm", "gemma2", **OPTIONS["gemma2"])
    JudgeSpec.load(small).save(folder)
    with pytest.raises(RuntimeError, match="prompt of record check 1 has other tokens"):
        export_gguf(folder, tmp_path / "judge.gguf", "f32")
    assert list(tmp_path.iterdir()) == [folder]


def test_no_room_for_the_types_is_found_before_any_work(small, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    monkeypatch.setenv("LLAMA_CPP_DIR", "/nowhere")
    with pytest.raises(RuntimeError, match="GB free: make room.*fewer or smaller types"):
        export_gguf(small, tmp_path / "judge.gguf", ["f16", "q4_k_m"])
    assert not list(tmp_path.iterdir())


def test_cleanup_removes_merged_judges_alone_and_not_what_it_wrote(small, tmp_path):
    with pytest.raises(ValueError, match="merged judges alone"):
        export_gguf(small.parent / "seed", tmp_path / "judge.gguf", cleanup=True)
    with pytest.raises(ValueError, match="choose another place"):
        export_gguf(small, small / "judge.gguf", cleanup=True)
    assert small.exists() and (small.parent / "seed").exists()


def test_export_and_cleanup_need_no_network(small, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n"
        "class Refusing(socket.socket):\n"
        "    def connect(self, address): raise SystemExit(f'asked for {address}')\n"
        "    connect_ex = connect\n"
        "socket.socket = Refusing\n"
        "socket.getaddrinfo = lambda *address: exec('raise SystemExit(address)')\n"
    )
    merged = shutil.copytree(small, tmp_path / "merged")
    code = (
        "import sys; from tract_lite.gguf import export_gguf\n"
        "export_gguf(*sys.argv[1:], ('f16', 'q4_k_m'), cleanup=True)"
    )
    environment = {**ONE_THREAD, "LLAMA_CPP_DIR": str(llama_cpp_source()), "PYTHONPATH": "."}
    environment["PYTHONPATH"] = os.pathsep.join((str(tmp_path), str(Path(parity.__file__).parents[1])))
    arguments = [str(merged), str(tmp_path / "judge.gguf")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment)
    assert done.returncode == 0
    assert {path.name for path in tmp_path.glob("*.*")} == {"judge-f16.gguf", "judge-q4_k_m.gguf", "sitecustomize.py"}
    assert not merged.exists()
    # A call that is killed while it removes the folder leaves such a one, and is called again.
    shutil.copytree(small, tmp_path / "merged.0killed0.part")
    export_gguf(merged, tmp_path / "judge.gguf", ("f16", "q4_k_m"), cleanup=True)
    assert not list(tmp_path.glob("merged*"))


def test_a_killed_export_is_finished_by_the_next_one(small, tmp_path):
    code = (
        "import sys; from tract_lite.gguf import export_gguf\n"
        "export_gguf(*sys.argv[1:], ('f16', 'q8_0', 'q4_k_m'), check=False)"
    )
    out = tmp_path / "judge.gguf"
    names = {"judge-f16.gguf", "judge-q8_0.gguf", "judge-q4_k_m.gguf"}
    environment = {**ONE_THREAD, "PYTHONPATH": str(Path(parity.__file__).parents[1])}
    # While the converter starts, and while the other types are made of what it wrote.
    for moment in ("*.part", "*.part/q8_0.gguf"):
        child = subprocess.Popen([sys.executable, "-c", code, str(small), str(out)], env=environment)
        while not list(tmp_path.glob(moment)) and child.poll() is None:
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        assert left.suffix == ".part"
    export_gguf(small, out, ("f16", "q8_0", "q4_k_m"), check=False)
    assert {path.name for path in tmp_path.iterdir()} == names


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
