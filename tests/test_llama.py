import logging
from types import SimpleNamespace

import llama_cpp
import pytest
from tiny import make_llama, make_sentences, make_spm

from tract_lite.engines import llama_cpp as llama
from tract_lite.engines.llama_cpp import Context, load_model
from tract_lite.export.gguf import export_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder / "model", make_spm(folder / "spm", make_sentences()))
    return export_gguf(folder / "model", folder / "model.gguf", "f32")


@pytest.fixture
def loaded(monkeypatch):
    """The parameters with which models are loaded from now on."""
    calls, load = [], llama_cpp.llama_model_load_from_file

    def spy(path, params):
        calls.append(SimpleNamespace(use_extra_bufts=params.use_extra_bufts))
        return load(path, params)

    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", spy)
    return calls


def pretend(monkeypatch, words: str) -> None:
    """Let llama.cpp say that of the processor."""
    text = f"CPU : SSE3 = 1 | {words} | REPACK = 1 | "
    monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: text.encode())


def load(path, **options) -> None:
    llama_cpp.llama_model_free(load_model(path, vocab_only=True, **options))


@pytest.mark.parametrize("by_default", [True, False])
def test_weights_are_never_repacked_unasked_where_amx_could_crash(path, loaded, by_default, monkeypatch, caplog):
    monkeypatch.setattr(llama, "REPACK", by_default)
    pretend(monkeypatch, "AMX_INT8 = 1")
    with caplog.at_level(logging.INFO, logger="tract_lite.llama"):
        load(path)
    assert [params.use_extra_bufts for params in loaded] == [False]
    assert "AMX" in caplog.text


@pytest.mark.parametrize("words", ["AVX512 = 1", "AMX_INT8 = 0"])
@pytest.mark.parametrize("by_default", [True, False])
def test_without_amx_the_default_decides_on_repacking(path, loaded, words, by_default, monkeypatch):
    monkeypatch.setattr(llama, "REPACK", by_default)
    pretend(monkeypatch, words)
    load(path)
    assert [params.use_extra_bufts for params in loaded] == [by_default]


def test_who_asks_for_repacked_weights_or_against_them_is_heard(path, loaded, monkeypatch):
    pretend(monkeypatch, "AMX_INT8 = 1")
    for chosen in (True, False):
        load(path, use_extra_bufts=chosen)
    assert [params.use_extra_bufts for params in loaded] == [True, False]


@pytest.mark.parametrize("share, why", [(0.5, "not within the file bounds"), (0.01, "failed to")])
def test_a_torn_file_gives_one_line_that_says_why_and_nothing_louder(path, share, why, tmp_path, caplog, capfd):
    whole, torn = path.read_bytes(), tmp_path / "torn.gguf"
    torn.write_bytes(whole[: int(share * len(whole))])
    caplog.set_level(logging.DEBUG, logger="tract_lite.llama")
    with pytest.raises(ValueError, match=why) as refusal:
        load_model(torn)
    assert "\n" not in str(refusal.value) and str(torn) in str(refusal.value)
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert capfd.readouterr().err == ""


def test_a_context_that_llama_cpp_refuses_says_why(path):
    model = load_model(path)
    with pytest.raises(RuntimeError, match="1 sequences of 64 tokens: .*(V cache|flash)"):
        Context(model, 1, 64, cache_type="q4_0", flash_attention=False)
    llama_cpp.llama_model_free(model)


def test_an_unknown_type_of_cache_is_refused_with_the_known_ones(path):
    model = load_model(path)
    with pytest.raises(ValueError, match="unknown cache_type 'f17'; there are .*f16.*q8_0"):
        Context(model, 1, 64, cache_type="f17")
    llama_cpp.llama_model_free(model)


def test_at_least_one_sequence_is_asked_for(path):
    model = load_model(path)
    with pytest.raises(ValueError, match="parallel must be at least 1, got 0"):
        Context(model, 0, 64)
    llama_cpp.llama_model_free(model)
