"""The judge that writes reasonings: the same one in llama.cpp as in transformers."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Callable

import pytest
from judges import make_adapter
from stages import SCALE, make_records
from tiny import load_tokenizer, make_llama, vocabulary_folder

from tract_lite.data.records import read_records
from tract_lite.engines.llama import LlamaEngine
from tract_lite.engines.pace import Pace, measure_length, measure_pace
from tract_lite.export import reasoning_judge as module
from tract_lite.export.converter import llama_cpp_source
from tract_lite.export.parity import compare
from tract_lite.export.reasoning_judge import LLAMA_CPP, TRANSFORMERS, open_fastest, open_in_llama_cpp, reasoning_judge
from tract_lite.judge import Judge
from tract_lite.judgement import Judgement
from tract_lite.prompt import prompt_ids
from tract_lite.spec import JudgeSpec, Sampling

pytestmark = pytest.mark.export

ITEMS = 500


@pytest.fixture(autouse=True)
def cache(shared_once: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, float32_cpu: None) -> Path:
    """A cache folder of these tests' own."""
    monkeypatch.setenv("LLAMA_CPP_DIR", str(llama_cpp_source()))
    folder = shared_once("reasoning_cache", lambda out: None)
    monkeypatch.setenv("TRACT_LITE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def adapters(shared_once: Callable[..., Path]) -> Path:
    """A random seed model in `seed`, and adapters on it; one of them replaces a whole weight."""

    def make(folder: Path) -> None:
        tokenizer = load_tokenizer("spm")
        seed = make_llama(folder / "seed", vocabulary_folder("spm"))
        for name, in_4bit, whole in (("4bit", True, None), ("16bit", False, ["lm_head"])):
            make_adapter(seed, folder / name, tokenizer, modules_to_save=whole)
            spec = JudgeSpec.load(folder / name)
            method = {"load_in_4bit": in_4bit, "precision": "float32"}
            replace(spec, method=method, max_length=256, sampling=Sampling(max_new_tokens=24)).save(folder / name)

    return shared_once("reasoning_adapters", make)


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


@pytest.mark.parametrize("name, other", [("4bit", "16bit"), ("16bit", "4bit")])
def test_the_weights_are_those_that_the_adapter_was_trained_on(adapters: Path, name: str, other: str) -> None:
    records = make_records(40, seed=1)
    with open_in_llama_cpp(adapters / name) as ours, Judge.from_adapter(adapters / name) as theirs:
        assert ours.how() == theirs.how() and ours.engine.shape != theirs.engine.shape
        given = list(theirs.score_many(records, reasonings=[[[7, 8, 9]]] * 40))
        assert compare(theirs, ours, records, given).mean_distance < 0.06
    with open_in_llama_cpp(adapters / other) as wrong:
        assert compare(wrong, wrong, records, given).mean_distance > 0.2


def interval(values: list[float]) -> float:
    """Half the width of the mean's 95 % interval."""
    return 1.96 * stdev(values) / math.sqrt(len(values))


@pytest.mark.training
def test_both_engines_write_reasonings_of_one_distribution(quick_run: Path) -> None:
    adapter = quick_run / "stage1"
    written = read_records(quick_run / "self_generated.jsonl")[:ITEMS]
    assert len(written) == ITEMS
    with open_in_llama_cpp(adapter) as ours, Judge.from_adapter(adapter, parallel=250) as theirs:
        # Those of the run are llama.cpp's: its scores after them, and all by transformers anew.
        own = list(ours.score_many(written, reasonings=[[list(record.feedback_ids or ())] for record in written]))
        expected = [one for one in theirs.score_many(written) if not one.truncated]
    figures: list[Callable[[Judgement], float]] = [lambda one: one.score, lambda one: len(one.feedback_ids[0])]
    for figure in figures:
        first, second = (list(map(figure, judgements)) for judgements in (own, expected))
        assert abs(fmean(first) - fmean(second)) < math.hypot(interval(first), interval(second)) < fmean(second) / 10


def test_a_seed_model_is_the_same_judge_in_both_engines(adapters: Path) -> None:
    asked = {"precision": "float32", "max_length": 4096, "template": "{{ response }}", "load_in_4bit": True}
    with (
        reasoning_judge(seed_model=adapters / "seed", scale=SCALE, **asked) as ours,
        Judge.from_seed(adapters / "seed", SCALE, **asked) as theirs,
    ):
        assert isinstance(ours.engine, LlamaEngine)
        assert ours.spec == theirs.spec and ours.how() == theirs.how()


def test_what_was_converted_is_not_converted_again(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasoning_judge(adapters / "16bit").close()
    for name in ("convert_model", "merge_adapter"):
        monkeypatch.setattr(module, name, None)
    reasoning_judge(adapters / "16bit").close()
    # By content, wherever they lie.
    moved = Path(shutil.copytree(adapters, tmp_path / "moved"))
    judge = reasoning_judge(moved / "16bit", seed_model=moved / "seed")
    assert isinstance(judge.engine, LlamaEngine)
    judge.close()


@pytest.mark.parametrize("broken, words", [("converter", "LLAMA_CPP_DIR"), ("length", "beyond 100 tokens")])
def test_where_llama_cpp_cannot_transformers_writes_and_the_reason_is_told(
    adapters: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    info: pytest.LogCaptureFixture,
    broken: str,
    words: str,
) -> None:
    if broken == "converter":
        monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
        monkeypatch.setenv("TRACT_LITE_CACHE", str(tmp_path / "cache"))
    elif broken == "length":
        monkeypatch.setattr(module, "reading_limit", lambda config: 100)
    with reasoning_judge(adapters / "16bit", parallel=3) as judge:
        assert judge.engine.shape["batch_size"] == 3 and "parallel" not in judge.engine.shape
        assert judge.score(make_records(1)[0]).feedback
    assert re.search(f"llama.cpp can't write the reasonings here: .*{words}", info.text)
    assert "transformers writes the reasonings" in info.text
    assert not list(tmp_path.rglob("*.part"))


def test_the_way_that_writes_more_tokens_a_second_is_taken_where_it_is_measured(
    adapters: Path, info: pytest.LogCaptureFixture
) -> None:
    ways = {
        LLAMA_CPP: partial(open_in_llama_cpp, adapters / "16bit"),
        "none": partial(open_in_llama_cpp, adapters / "none"),
        TRANSFORMERS: partial(Judge.from_adapter, adapters / "16bit"),
    }
    with open_fastest(ways, make_records(8), measure=True) as judge:
        taken = LLAMA_CPP if isinstance(judge.engine, LlamaEngine) else TRANSFORMERS
    told = re.search(r"(\S+) writes the reasonings \(tokens a second: llama.cpp (\d+), transformers (\d+)\)", info.text)
    assert told and "none can't write the reasonings here" in info.text
    rates = {LLAMA_CPP: int(told[2]), TRANSFORMERS: int(told[3])}
    assert taken == told[1] and rates[taken] == max(rates.values()) > 0


def test_what_no_way_can_open_is_told_as_the_last_one_says_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no judge spec at"):
        reasoning_judge(tmp_path)
    with pytest.raises(ValueError, match="name an adapter, or a seed model and its scale"):
        reasoning_judge()


# How fast one writes.


def test_reasonings_that_are_written_together_wait_for_the_longest() -> None:
    assert Pace(0.5, 0.1).seconds([10, 10, 20], [1, 2, 3]) == pytest.approx(20.6)
    assert Pace(0.5, 0.1, together=2).seconds([10, 10, 20], [1, 2, 3]) == pytest.approx(20.7)


def test_a_pace_is_measured_and_the_engine_left_as_it_was(adapters: Path) -> None:
    with open_in_llama_cpp(adapters / "16bit") as judge:
        spec, engine = judge.spec, judge.engine
        prompts = [prompt_ids(record, spec, engine.vocabulary) for record in make_records(40)]
        pace = measure_pace(engine, prompts, 0.2)
        assert pace.prompt > 0 and pace.token >= 0 and pace.together == 1
        assert engine.spec is spec
        # None of its reasonings ends.
        assert measure_length(engine, prompts, pace, 0.2) == spec.sampling.max_new_tokens


def test_the_files_that_were_used_last_are_kept(tmp_path: Path) -> None:
    for number in range(module.KEPT + 1):
        for name in (f"{number}.gguf", f"{number}.gguf.lock"):
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (number, number))
    # The newest one counts, and stays however old it looks.
    module._keep_few(tmp_path / "0.gguf")
    kept = [f"{number}.gguf{end}" for number in (0, *range(2, module.KEPT + 1)) for end in ("", ".lock")]
    assert sorted(file.name for file in tmp_path.iterdir()) == kept
