"""Models with a recurrent state: no tail can be forgotten, and they judge as all others do."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hybrids import HYBRIDS, hybrid_spec, make_hybrid
from tiny import make_sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from tract_lite.engines import llama as engine_module
from tract_lite.engines.context import Context, memory_bytes
from tract_lite.engines.llama import MAX_PARALLEL, LlamaEngine
from tract_lite.engines.llama_cpp import load_model, quiet_llama
from tract_lite.engines.task import Task
from tract_lite.engines.transformers import TransformersEngine
from tract_lite.judge import Judge
from tract_lite.prompt import Reasoning
from tract_lite.record import Record
from tract_lite.spec import JudgeSpec

pytestmark = pytest.mark.export

EXACT: dict[str, Any] = {"threads": 1, "flash_attention": False, "cache_type": "f32"}
LENGTH = 45


@pytest.fixture(scope="module", params=HYBRIDS)
def folder(request, shared_once):
    return shared_once(f"hybrid-{request.param}", lambda out: make_hybrid(out, request.param))


@pytest.fixture(scope="module")
def qwen(shared_once):
    return shared_once("hybrid-qwen3.5", lambda out: make_hybrid(out, "qwen3.5"))


def make_tasks(engine: Any, count: int, n_cot: int | None = None) -> list[Task]:
    """Prompts of `LENGTH` tokens; of four tasks one has four samples, unless `n_cot` is given."""
    texts = [" ".join(make_sentences(30, seed=number)) for number in range(count)]
    return [
        Task(
            engine.vocabulary.encode(text)[:LENGTH],
            range(10 * number, 10 * number + (n_cot or (1, 4)[number % 4 == 0])),
        )
        for number, text in enumerate(texts)
    ]


def mixed_tasks(engine: Any) -> list[Task]:
    """Ten tasks of 19 samples in all, half of them asked directly as well, before and after."""
    tasks = make_tasks(engine, 10)
    direct = [Task.direct(task.prompt) for task in tasks]
    return [*direct[:3], *tasks, *direct[2:5]]


def shares(answer: Any) -> np.ndarray:
    """The probabilities of each sample's labels, relative to their sum."""
    rows = np.exp([sample.label_log_probabilities for sample in answer])
    return rows / rows.sum(axis=1, keepdims=True)


def reasonings(answer: Any) -> list[list[int]]:
    return [sample.reasoning for sample in answer]


@pytest.fixture(scope="module")
def reference(folder):
    """The answers of transformers, one sequence at a time, to `mixed_tasks`."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    engine = TransformersEngine(model, tokenizer, JudgeSpec.load(folder / "model"), batch_size=1)
    return dict(engine.run(mixed_tasks(engine)))


@pytest.fixture
def endings(monkeypatch):
    """How reasonings ended, but for those that came to the limit."""
    found, add = Counter[str](), Reasoning.add

    def spy(self, token):
        written = [*self.ids, token]
        if complete := add(self, token):
            by_marker = written[len(self.ids) :] == self._marker
            found["end token" if token in self._ends else "marker" if by_marker else "other words"] += 1
        return complete

    monkeypatch.setattr(Reasoning, "add", spy)
    return found


@pytest.fixture
def decoded(monkeypatch):
    """How often a token was decoded, by its position."""
    found, decode = Counter[int](), Context.decode

    def spy(self, tokens, positions, sequences, outputs):
        found.update(positions)
        return decode(self, tokens, positions, sequences, outputs)

    monkeypatch.setattr(Context, "decode", spy)
    return found


@pytest.mark.parametrize("parallel", [1, 3, 33])
def test_reasonings_and_scores_are_those_of_transformers(folder, reference, endings, parallel):
    with LlamaEngine(folder / "judge.gguf", parallel=parallel, **EXACT) as engine:
        answers = dict(engine.run(mixed_tasks(engine)))
    assert [index for index in answers if reasonings(answers[index]) == [[]]] != []
    assert {index: reasonings(answers[index]) for index in answers} == {i: reasonings(reference[i]) for i in reference}
    for index, answer in answers.items():
        np.testing.assert_allclose(shares(answer), shares(reference[index]), atol=1e-4)
    truncated = sum(sample.truncated for answer in answers.values() for sample in answer)
    assert endings["marker"] and endings["end token"] and truncated


@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_a_prompt_is_read_once_however_its_reasonings_end(folder, endings, decoded, parallel):
    # Most of what is written ends at this letter inside of a word, and is cut there.
    spec = hybrid_spec(AutoTokenizer.from_pretrained(folder / "model"), "e")
    with LlamaEngine(folder / "judge.gguf", spec, parallel=parallel, **EXACT) as engine:
        tasks = make_tasks(engine, 5, n_cot=4)
        answers = dict(engine.run(tasks))
        assert {decoded[position] for position in range(LENGTH - 1)} == {5}
        assert endings["other words"] > 10
        # Other prompts are read where these were.
        given = [replace(task, reasonings=reasonings(answers[index])) for index, task in enumerate(tasks)]
        again = dict(engine.run(given[::-1]))
        assert {decoded[position] for position in range(LENGTH - 1)} == {10}
    for index, answer in answers.items():
        np.testing.assert_allclose(shares(answer), shares(again[4 - index]), atol=1e-4)


def test_twenty_records_with_three_reasonings_are_judged_alike_alone_and_together(qwen):
    records = [Record(prompt=text) for text in make_sentences(20, seed=5)]
    judgements = []
    for parallel in (None, 1):
        with Judge.from_gguf(qwen / "judge.gguf", parallel=parallel, **EXACT) as judge:
            judgements.append(list(judge.score_many(records, n_cot=3)))
            assert judge.engine.shape["parallel"] == (parallel or MAX_PARALLEL)
    for together, alone in zip(*judgements, strict=True):
        assert not together.error and together.feedback_ids == alone.feedback_ids
        assert together.score / together.mass == pytest.approx(alone.score / alone.mass, abs=1e-4)


def test_what_a_state_takes_counts_where_parallel_is_left_open(qwen, monkeypatch):
    model = load_model(qwen / "judge.gguf")
    token, sequence = memory_bytes(model)
    quiet_llama().llama_model_free(model)
    # Two layers of attention with two heads of keys and values of 16, in 16 bits.
    assert 2 * 2 * 2 * 16 * 2 <= token < 2 * 2 * 2 * 16 * 2 + 100
    # Two others: four heads of 16 x 16, three steps before the convolution; in 32 bits, and copied.
    state = 2 * (4 * 16 * 16 + 3 * (2 * 2 * 16 + 4 * 16)) * 4
    assert 2 * state <= sequence < 2 * state + 1000
    monkeypatch.setattr(engine_module, "CACHE_BYTES", 5 * (512 * token + sequence) + 1)
    with LlamaEngine(qwen / "judge.gguf", context_length=512, **EXACT) as engine:
        assert engine.shape["parallel"] == 5


def test_what_was_not_kept_is_not_silently_read_on_from(qwen):
    model = load_model(qwen / "judge.gguf")
    context = Context(model, 2, 64, threads=1)
    context.decode([5, 6, 7], [0, 1, 2], [0, 0, 0], [2])
    with pytest.raises(RuntimeError, match="can't set a sequence of this model back"):
        context.cut(0, 2)
    context.cut(0, 0)
    context.close()
    quiet_llama().llama_model_free(model)
