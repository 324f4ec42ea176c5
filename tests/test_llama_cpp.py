import logging
from types import SimpleNamespace

import llama_cpp
import numpy as np
import pytest
from judges import make_wide_judge
from tiny import make_plain_judge

from tract_lite.engines.context import CACHES, Context
from tract_lite.engines.llama import LlamaEngine
from tract_lite.engines.llama_cpp import has_amx, load_model
from tract_lite.engines.task import Task


@pytest.fixture(scope="module")
def path(shared_once):
    return shared_once("plain_judge", make_plain_judge) / "judge.gguf"


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


AMX = pytest.mark.parametrize("words, amx", [("AVX512 = 1", False), ("AMX_INT8 = 0", False), ("AMX_INT8 = 1", True)])


@AMX
def test_a_processor_with_amx_is_known_by_llama_cpp_s_words(words, amx, monkeypatch):
    pretend(monkeypatch, words)
    assert has_amx() == amx


@AMX
def test_weights_are_never_repacked_unasked(path, loaded, words, amx, monkeypatch, caplog):
    pretend(monkeypatch, words)
    with caplog.at_level(logging.INFO, logger="tract_lite"):
        llama_cpp.llama_model_free(load_model(path, vocab_only=True))
        LlamaEngine(path, threads=1, parallel=1).close()
    assert [params.use_extra_bufts for params in loaded] == [False, False]
    assert not caplog.records


def test_who_asks_for_repacked_weights_gets_them(path, loaded, monkeypatch):
    pretend(monkeypatch, "AMX_INT8 = 0")
    for chosen in (True, False):
        with LlamaEngine(path, threads=1, parallel=1, repack=chosen) as engine:
            assert engine.shape["repack"] == chosen
    assert [params.use_extra_bufts for params in loaded] == [True, False]


def test_who_asks_for_repacked_weights_where_they_crash_is_refused(path, loaded, monkeypatch):
    pretend(monkeypatch, "AMX_INT8 = 1")
    with pytest.raises(ValueError, match="has AMX: leave repack off"):
        LlamaEngine(path, repack=True)
    assert not loaded


@pytest.mark.parametrize("share, why", [(0.5, "not within the file bounds"), (0.01, "failed to")])
def test_a_torn_file_gives_one_line_that_says_why_and_nothing_louder(path, share, why, tmp_path, caplog, capfd):
    whole, torn = path.read_bytes(), tmp_path / "torn.gguf"
    torn.write_bytes(whole[: int(share * len(whole))])
    caplog.set_level(logging.DEBUG, logger="tract_lite.engines.llama_cpp")
    with pytest.raises(ValueError, match=why) as refusal:
        load_model(torn)
    assert "\n" not in str(refusal.value) and str(torn) in str(refusal.value)
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert capfd.readouterr().err == ""


def test_a_context_that_llama_cpp_refuses_says_why(path, monkeypatch):
    model = load_model(path)
    advice = "take cache_type f16: .* needs flash attention and heads of a multiple of 32 values"
    with pytest.raises(RuntimeError, match=f"1 sequences of 64 tokens: .*(V cache|flash).*\n{advice}"):
        Context(model, 1, 64, cache_type="q4_0", flash_attention=False)
    # Heads of 16 values.
    with pytest.raises(RuntimeError, match=f"block size 32 does not divide.*\n{advice}"):
        Context(model, 1, 64, cache_type="Q8_0")
    monkeypatch.setattr(llama_cpp, "llama_init_from_model", lambda *_: None)
    with pytest.raises(RuntimeError, match="2 sequences of 64 tokens: .*\nlower parallel or context_length$"):
        Context(model, 2, 64)
    llama_cpp.llama_model_free(model)


def test_an_unknown_type_of_cache_is_refused_with_the_known_ones(path):
    model = load_model(path)
    # llama.cpp has other types as well, which end the process when they are read.
    for name in ("f17", "i32", "count"):
        with pytest.raises(ValueError, match=f"unknown cache_type '{name}'; there are f16, f32, q8_0"):
            Context(model, 1, 64, cache_type=name)
    llama_cpp.llama_model_free(model)


@pytest.mark.export
@pytest.mark.parametrize("cache_type", CACHES)
def test_every_type_of_cache_that_is_named_can_be_read_back(cache_type, shared_once):
    # Heads of 64 values, which all blocks divide.
    file = shared_once("wide_judge", make_wide_judge) / "out" / "judge-3.2-f32"
    with LlamaEngine(file, threads=1, parallel=1, cache_type=cache_type) as engine:
        [(_, [sample])] = engine.run([Task([1, *engine.vocabulary.encode("The answer is clear.")], [7], [[8, 9]])])
    assert np.isfinite(sample.label_log_probabilities).all()


def test_at_least_one_sequence_is_asked_for(path):
    model = load_model(path)
    with pytest.raises(ValueError, match="parallel must be at least 1, got 0"):
        Context(model, 0, 64)
    llama_cpp.llama_model_free(model)
