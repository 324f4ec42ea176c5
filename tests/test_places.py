"""What names stand for: content wherever it lies, models, ids of the hub."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import httpx
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled

from tract_lite.data.hub import OFFLINE_SWITCHES, is_hub_id, why_not_fetched
from tract_lite.data.places import check_model, content_of, seed_model_of, why_not_loaded


def make_model(folder: Path, weights: bytes = b"w" * 99) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_file_is_what_it_holds(tmp_path: Path) -> None:
    first = tmp_path / "a.csv"
    first.write_bytes(b"x")
    second = Path(shutil.copy(first, tmp_path / "Zweite Datei.csv"))
    assert content_of(first) and content_of(first) == content_of(second)
    second.write_bytes(b"y")
    assert content_of(first) != content_of(second)
    assert content_of(tmp_path / "none") is content_of("a/hub-id") is None


def test_a_model_s_folder_is_its_config_its_vocabulary_and_its_weights(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    before = content_of(model)
    moved = model.rename(tmp_path / "anderswo, öfter")
    (moved / "README.md").write_text("A card.")
    (moved / ".cache").mkdir()
    assert content_of(moved) == before
    for name in ("config.json", "tokenizer_config.json", "model-2.safetensors"):
        (moved / name).write_text("[]")
        assert content_of(moved) != before
        before = content_of(moved)


@pytest.mark.parametrize("name", ["gpt2", "mistralai/Mistral-7B-v0.3", "a/b_c.d-e"])
def test_ids_of_the_hub_are_known(name: str) -> None:
    assert is_hub_id(name)
    check_model(name)


@pytest.mark.parametrize(
    "name", ["./model", "../model", "/model", "a/b/c", "a b/c", "C:\\models\\a", "~/model", "", "é/a"]
)
def test_what_can_be_no_id_must_be_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(name)
    if name:
        with pytest.raises(FileNotFoundError, match="^no folder .*, and no id of the hub looks like that$"):
            check_model(name)
        assert why_not_loaded(name, ValueError("Repo id must use")).endswith("no id of the hub looks like that")


def test_a_folder_that_holds_a_model_deeper_down_says_where(tmp_path: Path) -> None:
    make_model(tmp_path / "run" / "merged")
    with pytest.raises(ValueError, match=f"it has no config.json; {tmp_path / 'run' / 'merged'} has one"):
        check_model(tmp_path / "run")
    with pytest.raises(ValueError, match="config.json is a file: name the folder"):
        check_model(tmp_path / "run" / "merged" / "config.json")
    check_model(tmp_path / "run" / "merged")


def raised(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


REFUSAL = httpx.Response(403, request=httpx.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    "error, words",
    [
        (
            raised(OSError("You are trying"), GatedRepoError("403", response=REFUSAL)),
            "asks for consent: .*hf auth login",
        ),
        (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "asks for consent"),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "does not show it: check the name"),
        (LocalEntryNotFoundError("Got: ConnectError"), "can't be reached: .*`hf download a/b`"),
        (raised(OSError("We couldn't connect"), ConnectionError()), "can't be reached"),
        (raised(ConnectionError("Couldn't reach"), OfflineModeIsEnabled("offline")), "can't be reached"),
        (httpx.ConnectTimeout("slow"), "can't be reached"),
        (
            raised(OSError("PermissionError at /hub"), PermissionError(13, "no")),
            "PermissionError at /hub.: HF_HOME names",
        ),
        (ValueError("odd\nmore"), "did not give it: odd$"),
        (KeyError(), "did not give it: KeyError$"),
    ],
)
def test_why_the_hub_gives_nothing_comes_with_the_next_step(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for switch in OFFLINE_SWITCHES:
        monkeypatch.delenv(switch, raising=False)
    told = why_not_fetched("a/b", error)
    assert len(told.splitlines()) == 1 and re.search(words, told)


def test_a_switch_that_forbids_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert why_not_fetched("a/b", LocalEntryNotFoundError("")).startswith("the hub can't be reached")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert why_not_fetched("a/b", LocalEntryNotFoundError("")).startswith(
        "HF_HUB_OFFLINE is set, and the cache lacks it"
    )


def test_the_seed_model_of_an_adapter_is_found_in_a_run_s_folder_that_was_moved(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    model = make_model(run / "models" / "seed")
    adapter = run / "stage2" / "adapter"
    adapter.mkdir(parents=True)
    assert seed_model_of(str(model), adapter) == str(model)
    moved = (tmp_path / "runs").rename(tmp_path / "andere").joinpath("mine").rename(tmp_path / "andere" / "deins")
    assert seed_model_of(str(model), moved / "stage2" / "adapter") == str(moved / "models" / "seed")
    assert seed_model_of("an/id", moved / "stage2" / "adapter") == "an/id"
    shutil.rmtree(moved / "models")
    assert seed_model_of(str(model), moved / "stage2" / "adapter") == str(model)
