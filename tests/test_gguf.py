"""A model folder to GGUF: types, ids, the spec inside, and what failed and killed exports leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from judges import OPTIONS, TYPES, make_wide_judge
from tiny import make_family, vocabulary_folder
from transformers import AutoTokenizer

from tract_lite.data.jsonl import read_json
from tract_lite.engines.llama import LlamaEngine
from tract_lite.engines.llama_cpp import read_spec
from tract_lite.engines.task import Task
from tract_lite.export import model_folder
from tract_lite.export.converter import llama_cpp_source, quantize
from tract_lite.export.gguf import export_gguf
from tract_lite.spec import JudgeSpec

pytestmark = pytest.mark.export

ROOT = Path(__file__).parents[1]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model(shared_once):
    return shared_once("wide_judge", make_wide_judge) / "model"


@pytest.fixture(scope="module")
def exported(model):
    return [model.parent / "out" / f"judge-3.2-{name}" for name in TYPES]


def test_several_types_give_a_file_each_and_nothing_else(exported):
    assert names_in(exported[0].parent) == {path.name for path in exported}


def test_what_the_gate_has_measured_stands_in_a_file_beside_earlier_figures(exported):
    figures = read_json(exported[0].parents[1] / "parity.json")
    assert figures.pop("earlier.gguf") == {"records": 7}
    assert list(figures) == [path.name for path in exported]
    f32, q8_0, q4_k_m = figures.values()
    assert all(row["records"] == 2 and row["different_prompts"] == 0 for row in figures.values())
    assert 0 < f32["mean_distance"] < q8_0["mean_distance"] < q4_k_m["mean_distance"] < 1
    assert 0 < f32["mean_difference"] <= f32["largest_difference"] < 1e-3


def test_the_spec_travels_through_conversion_and_quantisation(model, exported):
    spec = JudgeSpec.load(model)
    assert [read_spec(path) for path in exported] == [spec] * 3


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_type_loads_and_judges(exported, number):
    with LlamaEngine(exported[number], threads=1, parallel=2) as engine:
        task = Task([1, *engine.vocabulary.encode("The answer is clear.")], [7, 8])
        [(index, samples)] = engine.run([task])
    assert index == 0 and len(samples) == 2
    assert all((sample.label_log_probabilities < 0).all() for sample in samples)


def test_smaller_types_give_smaller_files(exported):
    f32, q8_0, q4_k_m = (path.stat().st_size for path in exported)
    assert q8_0 < 0.3 * f32 and q4_k_m < 0.2 * f32


def test_an_spm_folder_without_its_model_file_is_refused(model, tmp_path):
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    shutil.copy(model / "config.json", tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="tokenizer.model"):
        export_gguf(tmp_path, tmp_path / "judge.gguf")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "give the model in 16 bits"),
        ({"model_type": "gemma2", "tie_word_embeddings": False}, "untied embeddings"),
    ],
)
def test_a_folder_that_the_converter_can_not_take_is_refused(model, tmp_path, change, words):
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words):
        export_gguf(folder, tmp_path / "judge.gguf")


def test_what_can_not_be_written_is_said_before_any_work(model, tmp_path):
    with pytest.raises(ValueError, match="no quantization"):
        export_gguf(model, tmp_path / "judge.gguf", [])
    with pytest.raises(ValueError, match="is a folder"):
        export_gguf(model, tmp_path)
    assert model.exists()


def test_an_unknown_quantization_is_refused_with_the_known_ones(model, tmp_path):
    with pytest.raises(ValueError, match="unknown quantization q5_9\ntake q4_k_m, .*f32"):
        export_gguf(model, tmp_path / "judge.gguf", ["q8_0", "q5_9"])
    with pytest.raises(ValueError, match="IQ2_XS needs an importance matrix"):
        export_gguf(model, tmp_path / "judge.gguf", "IQ2_XS")
    assert names_in(tmp_path) == set()


def test_a_type_in_any_case_names_its_file_as_it_was_asked_for(model, tmp_path):
    files = export_gguf(model, tmp_path / "judge.gguf", ["Q4_K_M", "F16"], check=False)
    assert [file.name for file in files] == ["judge-Q4_K_M.gguf", "judge-F16.gguf"]
    assert names_in(tmp_path) == {file.name for file in files}


def test_what_the_quantiser_refuses_is_said_in_its_words(exported, tmp_path):
    with pytest.raises(RuntimeError, match="quantise to iq1_s: .*requires an imatrix!\nis there room") as refused:
        quantize(exported[0], tmp_path / "judge.gguf", "iq1_s")
    assert len(str(refused.value).splitlines()) == 2


def test_a_failed_export_says_why_and_leaves_nothing(model, tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "conversion").mkdir(parents=True)
    (source / "gguf.py").write_text("class GGUFWriter: pass")
    (source / "conversion" / "base.py").write_text("class ModelBase: pass")
    (source / "convert_hf_to_gguf.py").write_text("raise SystemExit('no such architecture')")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(source))
    with pytest.raises(RuntimeError, match="no such architecture"):
        export_gguf(model, tmp_path / "out" / "judge.gguf", "q4_k_m")
    assert names_in(tmp_path / "out") == set()


def test_a_folder_without_a_converter_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="LLAMA_CPP_DIR"):
        llama_cpp_source()


def test_the_spec_of_another_vocabulary_is_refused(model, tmp_path):
    spec = json.loads(JudgeSpec.load(model).to_json())
    spec["pieces"][-1] = "9"
    with pytest.raises(ValueError, match="vocabulary"):
        export_gguf(model, tmp_path / "judge.gguf", "f32", JudgeSpec.from_json(json.dumps(spec)))
    assert names_in(tmp_path) == set()


def test_what_is_no_gguf_file_is_refused_in_one_line(exported, tmp_path):
    text, torn = tmp_path / "text.gguf", tmp_path / "torn.gguf"
    text.write_text("The answer is clear.")
    torn.write_bytes(exported[0].read_bytes()[:4000])
    for path in (text, torn):
        with pytest.raises(ValueError, match=path.name) as refusal:
            read_spec(path)
        assert "\n" not in str(refusal.value)


def test_a_file_that_reads_other_tokens_does_not_get_its_name(model, tmp_path):
    # The converter writes Gemma's vocabulary without a space before a text, and this one has it.
    folder = make_family(tmp_path / "gemma2", vocabulary_folder("spm"), "gemma2", **OPTIONS["gemma2"])
    JudgeSpec.load(model).save(folder)
    with pytest.raises(RuntimeError, match="prompt of record check 1 has other tokens"):
        export_gguf(folder, tmp_path / "judge.gguf", "f32", figures=tmp_path / "parity.json")
    assert list(tmp_path.iterdir()) == [folder]


def test_no_room_for_the_types_is_found_before_any_work(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(model_folder.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    monkeypatch.setenv("LLAMA_CPP_DIR", "/nowhere")
    with pytest.raises(RuntimeError, match="GB free: make room.*fewer or smaller types"):
        export_gguf(model, tmp_path / "judge.gguf", ["f16", "q4_k_m"])
    assert not list(tmp_path.iterdir())


# Importing is slow, so the killed ones are forks.
KILL = """
import os, signal, sys, time
from pathlib import Path
from tract_lite.export.gguf import export_gguf

model, folder = sys.argv[1], Path(sys.argv[2])
# While the converter starts, and while the other types are made of what it wrote.
for moment in ("*.part", "*.part/q8_0.gguf"):
    child = os.fork()
    if not child:
        try:
            export_gguf(model, folder / "judge.gguf", ("f16", "q8_0", "q4_k_m"), check=False)
        finally:
            os._exit(0)
    while not list(folder.glob(moment)):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = folder.iterdir()
    assert left.suffix == ".part"
export_gguf(model, folder / "judge.gguf", ("f16", "q8_0", "q4_k_m"))
"""
NO_NETWORK = """
import socket
class Refusing(socket.socket):
    def connect(self, address): raise SystemExit(f"asked for {address}")
    connect_ex = connect
socket.socket = Refusing
socket.getaddrinfo = lambda *address: exec("raise SystemExit(address)")
"""


def test_a_killed_export_is_finished_by_the_next_one_and_none_needs_the_network(model, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    out = tmp_path / "out"
    out.mkdir()
    paths = {"LLAMA_CPP_DIR": str(llama_cpp_source()), "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, "-c", KILL, str(model), str(out)]
    done = subprocess.run(command, env={**ONE_THREAD, **paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert names_in(out) == {"judge-f16.gguf", "judge-q8_0.gguf", "judge-q4_k_m.gguf"}
    assert "parity: q4_k_m: 5 records" in done.stderr
