"""llama.cpp: many sequences decoded at once over a shared prompt cache.

Each sample of a task works with a slot of `slots.py`. Sampling adds an id to what the slot is to
hold; a finished reasoning makes that prompt, cut reasoning and marker, and the score is read.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Iterable, Iterator

from tract_lite.draw import TokenSampler
from tract_lite.llama import (
    Context, cache_bytes, load_model, quiet_llama, repacks_weights, spec_of, system_info,
)
from tract_lite.llama_adapter import load_adapter, set_adapter
from tract_lite.prompt import Reasoning
from tract_lite.rail import label_log_probabilities
from tract_lite.sampling import Sample, Task, room_for
from tract_lite.slots import Slot, Slots
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import GGUFVocabulary

# Where `parallel` is left open: what the cache takes at most, and how many sequences there are. A
# CPU decodes 32 sequences for less than twice the time of 16; more gain little.
CACHE_BYTES = 4 * 10**9
MAX_PARALLEL = 32
# Tasks are taken from the input in windows of this many times `parallel`, and sorted inside one.
WINDOW_PARALLEL = 2


def default_parallel(context_length: int, token_bytes: int) -> int:
    """As many sequences of that many tokens as together keep to `CACHE_BYTES`, within 1 to 32.

    `token_bytes`: what one token takes in the cache.
    """
    return max(1, min(MAX_PARALLEL, CACHE_BYTES // (context_length * token_bytes)))


@dataclass
class _Job:
    """One sample of a task. With a sampler it writes its reasoning, then its score is read."""

    index: int
    number: int
    samples: list[Sample | None]
    prompt: list[int]
    room: int
    reasoning: Reasoning
    sampler: TokenSampler | None
    truncated: bool = False


class LlamaEngine:
    """Answers tasks with a GGUF model, up to `parallel` samples at once.

    `context_length`: tokens that one sample may take, by default the spec's `max_length` within
    what the model was trained for; the memory holds `parallel` times as many. `parallel`: None for
    what `default_parallel` gives. `threads`: None for all CPUs in reach. `gpu_layers`: below 0 for
    all. `flash_attention`: None leaves the choice to llama.cpp. `cache_type`: a type of llama.cpp,
    such as "f16", "f32" or "q8_0". `repack`: keep a second copy of the weights in the processor's
    own order; None for what pays.

    `adapter`: a GGUF adapter on top of the file, which brings the spec; see `use_adapter`.

    `shape` tells what the rounding of a run hangs on, to be kept with its results.

    Raises:
        ValueError: not a usable GGUF file, no judge spec, or the spec of another vocabulary.
        RuntimeError: llama.cpp can't hold that much.
    """

    _model = _context = None

    def __init__(self, path: str | Path, spec: JudgeSpec | None = None, *,
                 parallel: int | None = None, threads: int | None = None, gpu_layers: int = -1,
                 context_length: int | None = None, flash_attention: bool | None = None,
                 cache_type: str = "f16", repack: bool | None = None,
                 adapter: str | Path | None = None):
        self._llama = llama = quiet_llama()
        repack = repacks_weights() if repack is None else repack
        self._model = load_model(path, n_gpu_layers=gpu_layers, use_extra_bufts=repack)
        if llama.llama_model_is_recurrent(self._model) or llama.llama_model_is_hybrid(self._model):
            raise ValueError(f"{path} is a recurrent model, which can't be set back to its prompt")
        self.vocabulary = GGUFVocabulary(self._model)
        self._adapters: dict[Path, tuple[Any, JudgeSpec | None]] = {}
        pointer, found = self._load_adapter(adapter) if adapter else (None, spec_of(self._model))
        self.spec = self._checked(spec or found, adapter or path)
        self.context_length = context_length or min(
            self.spec.max_length, llama.llama_model_n_ctx_train(self._model))
        if parallel is None:
            parallel = default_parallel(self.context_length, cache_bytes(self._model))
        self._parallel = parallel
        self._slots: Slots | None = None
        self._context = Context(self._model, parallel, self.context_length, threads=threads,
                                flash_attention=flash_attention, cache_type=cache_type)
        set_adapter(self._context.pointer, pointer)
        self.shape = {
            "parallel": parallel, "context_length": self.context_length,
            "threads": self._context.threads, "batch_size": self._context.batch_size,
            "gpu_layers": gpu_layers, "flash_attention": flash_attention, "cache_type": cache_type,
            "repack": repack, "llama_cpp_python": llama.__version__, "system": system_info(),
        }

    def use_adapter(self, path: str | Path, spec: JudgeSpec | None = None) -> None:
        """Be the judge of another adapter from the next run on; the base is not loaded again.

        An adapter stays in memory until the engine is closed. The context length stays as it is.

        Raises:
            ValueError: not an adapter on this base, or one without a spec for its vocabulary.
            RuntimeError: the engine is closed or inside a run.
        """
        if self._slots or not self._context:
            raise RuntimeError("the engine is closed, or inside a run")
        pointer, found = self._load_adapter(path)
        self.spec = self._checked(spec or found, path)
        set_adapter(self._context.pointer, pointer)

    def _load_adapter(self, path: str | Path) -> tuple[Any, JudgeSpec | None]:
        key = Path(path).resolve()
        if key not in self._adapters:
            self._adapters[key] = load_adapter(self._model, path)
        return self._adapters[key]

    def _checked(self, spec: JudgeSpec | None, path: str | Path) -> JudgeSpec:
        if spec is None:
            raise ValueError(f"{path} holds no judge spec: export it with one, or give one")
        spec.check_vocabulary(self.vocabulary)
        return spec

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[int, list[Sample] | Exception]]:
        """The answer of each task with its index in the input, as they are completed.

        A task that does not fit in the context is answered with a ValueError. Tasks are taken from
        the input as slots come free, some ahead, since those that share most of their prompts are
        answered one after the other. A run shares nothing with the one before, so that the same
        tasks get the same answers.

        Raises:
            RuntimeError: the engine is closed or inside another run, or llama.cpp failed.
        """
        if self._slots or not self._context:
            raise RuntimeError("the engine is closed, or inside another run")
        self._slots = Slots(self._context, self._parallel)
        try:
            for answer in self._answers(tasks):
                yield answer
                if not self._context:
                    raise RuntimeError("the engine was closed inside a run")
        finally:
            self._slots = None

    def close(self) -> None:
        """Free the model and its memory."""
        if self._context:
            self._context.close()
        if self._model:
            self._llama.llama_model_free(self._model)
        self._context = self._model = None

    def __del__(self) -> None:
        # At the interpreter's end llama.cpp's functions are gone, and the memory goes by itself.
        if not sys.is_finalizing():
            self.close()

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _answers(self, tasks: Iterable[Task]) -> Iterator[tuple[int, list[Sample] | Exception]]:
        for index, task in self._sorted(tasks):
            try:
                jobs = self._jobs(index, task)
            except ValueError as error:
                yield index, error
                continue
            for job in jobs:
                while not self._slots.take(job, self._ids(job)):
                    yield from self._step()
        while self._slots.busy:
            self._slots.close_gap()
            yield from self._step()

    def _sorted(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Task]]:
        """The tasks with their numbers, in an order in which neighbours share long prefixes.

        Every other window is backwards: it begins with what the one before it ended with.
        """
        numbered, backwards = enumerate(tasks), False
        while window := list(islice(numbered, WINDOW_PARALLEL * self._parallel)):
            yield from sorted(window, key=lambda pair: list(pair[1].prompt), reverse=backwards)
            backwards = not backwards

    def _jobs(self, index: int, task: Task) -> list[_Job]:
        room = room_for(task, self.spec, self.context_length)
        jobs, samples = [], [None] * len(task.seeds)
        for number, seed in enumerate(task.seeds):
            reasoning, sampler = Reasoning(self.spec, self.vocabulary), None
            if task.reasonings is None:
                sampler = TokenSampler(self.spec.sampling, seed)
            else:
                reasoning.ids = list(task.reasonings[number])
            jobs.append(_Job(index, number, samples, list(task.prompt), room, reasoning, sampler))
        return jobs

    def _ids(self, job: _Job) -> list[int]:
        """What the next logits of a job are read after."""
        if job.sampler:
            return job.prompt
        return [*job.prompt, *job.reasoning.ids, *self.spec.marker_ids]

    def _step(self) -> list[tuple[int, list[Sample]]]:
        """Decode once and let the slots go on; returns the answers that this completes."""
        answers = []
        for slot, row in self._slots.decode():
            job, logits = slot.job, self._context.logits(row)
            if job.sampler:
                self._write(slot, job.sampler.draw(logits))
                continue
            scores = label_log_probabilities(logits, self.spec.label_ids)
            job.samples[job.number] = Sample(job.reasoning.ids, job.truncated, scores)
            slot.job = None
            if all(job.samples):
                answers.append((job.index, job.samples))
        return answers

    def _write(self, slot: Slot, token: int | None) -> None:
        """Add a sampled token to a reasoning; where it ends there, go on to the marker."""
        job = slot.job
        # Where nothing could be drawn, the score will show what is wrong.
        complete = token is None or job.reasoning.add(token)
        job.truncated = not complete and len(job.reasoning.ids) >= job.room
        if complete or job.truncated:
            job.sampler = None
            self._slots.hold(slot, self._ids(job))
        else:
            slot.ids.append(token)
