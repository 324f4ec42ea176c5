"""llama.cpp as an engine: many sequences decoded at once over a shared prompt cache.

Each sample of a task works with a slot of `sequences.py`. Sampling adds an id to what the slot is
to hold; a finished reasoning makes that prompt, cut reasoning and marker, and the score is read.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Iterable, Iterator

from tract_lite.data.files import fingerprint
from tract_lite.engines.context import Context
from tract_lite.engines.llama_cpp import (
    cache_bytes,
    has_amx,
    load_adapter,
    load_model,
    quiet_llama,
    spec_at,
    spec_of,
    system_info,
)
from tract_lite.engines.sampler import Writing
from tract_lite.engines.sequences import Slots
from tract_lite.engines.task import Sample, Task, room_for
from tract_lite.rail import label_log_probabilities
from tract_lite.spec import JudgeSpec, SpecSource
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
    """One sample of a task. Its reasoning is written unless it is `given`; then its score is read."""

    index: int
    number: int
    samples: list[Any]
    prompt: list[int]
    writing: Writing
    given: list[int] | None

    @property
    def reasoning(self) -> list[int] | None:
        """None while it is being written."""
        return self.given if self.given is not None else self.writing.ids if self.writing.done else None


class LlamaEngine:
    """Answers tasks with a GGUF model, up to `parallel` samples at once.

    `spec`: a spec or the path of one; None for the one inside the file. `adapter`: a GGUF adapter
    on top of the file, which brings the spec; see `use_adapter`.

    `context_length`: tokens that one sample may take, by default the spec's `max_length` within
    what the model was trained for; the memory holds `parallel` times as many. `parallel`: None for
    what `default_parallel` gives. `threads`: None for all CPUs in reach. `gpu_layers`: below 0 for
    all. `flash_attention`: None leaves the choice to llama.cpp. `cache_type`: a type of llama.cpp,
    such as "f16", "f32" or "q8_0". `repack`: keep a second copy of the weights in the processor's
    own order.

    Raises:
        ValueError: not a usable GGUF file, no judge spec, the spec of another vocabulary, or
            `repack` on a processor with AMX.
        RuntimeError: llama.cpp can't hold that much.
    """

    def __init__(
        self,
        path: str | Path,
        spec: SpecSource | None = None,
        *,
        adapter: str | Path | None = None,
        parallel: int | None = None,
        threads: int | None = None,
        gpu_layers: int = -1,
        context_length: int | None = None,
        flash_attention: bool | None = None,
        cache_type: str = "f16",
        repack: bool = False,
    ):
        self._model: Any = None
        self._context: Any = None
        self._slots: Slots | None = None
        self._llama = llama = quiet_llama()
        if repack and has_amx():
            raise ValueError(
                "llama.cpp crashes with repacked weights on this processor, which has AMX: leave repack off"
            )
        self._model = load_model(path, n_gpu_layers=gpu_layers, use_extra_bufts=repack)
        if llama.llama_model_is_recurrent(self._model) or llama.llama_model_is_hybrid(self._model):
            raise ValueError(f"{path} is a recurrent model, which can't be set back to its prompt")
        self.vocabulary = GGUFVocabulary(self._model)
        self._adapters: dict[Path, tuple[Any, JudgeSpec | None]] = {}
        self.identity = {"fingerprint": fingerprint(path), "adapter": None}
        pointer = None
        if adapter:
            pointer, self.spec = self._adapter(adapter, spec)
        else:
            self.spec = self._checked(spec, spec_of(self._model), path)
        self.context_length = context_length or min(self.spec.max_length, llama.llama_model_n_ctx_train(self._model))
        if parallel is None:
            parallel = default_parallel(self.context_length, cache_bytes(self._model))
        self._parallel = parallel
        self._context = Context(
            self._model,
            parallel,
            self.context_length,
            threads=threads,
            flash_attention=flash_attention,
            cache_type=cache_type,
        )
        self._context.use_adapter(pointer)
        self.shape = {
            "model": Path(path).name,
            "parallel": parallel,
            "context_length": self.context_length,
            "threads": self._context.threads,
            "batch_size": self._context.batch_size,
            "gpu_layers": gpu_layers,
            "flash_attention": flash_attention,
            "cache_type": cache_type,
            "repack": repack,
            "llama_cpp_python": llama.__version__,
            "system": system_info(),
        }

    def use_adapter(self, path: str | Path, spec: SpecSource | None = None) -> None:
        """Be the judge of another adapter from the next run on; the base is not loaded again.

        An adapter stays in memory until the engine is closed. The context length stays as it is.

        Raises:
            ValueError: not an adapter on this base, or one without a spec for its vocabulary.
            RuntimeError: the engine is closed or inside a run.
        """
        if self._slots or not self._context:
            raise RuntimeError("the engine is closed, or inside a run")
        pointer, self.spec = self._adapter(path, spec)
        self._context.use_adapter(pointer)

    def _adapter(self, path: str | Path, spec: SpecSource | None) -> tuple[Any, JudgeSpec]:
        key = Path(path).resolve()
        if key not in self._adapters:
            self._adapters[key] = load_adapter(self._model, path)
        pointer, found = self._adapters[key]
        self.identity["adapter"] = fingerprint(path)
        return pointer, self._checked(spec, found, path)

    def _checked(self, spec: SpecSource | None, found: JudgeSpec | None, path: str | Path) -> JudgeSpec:
        """The spec that is given, or else the one that was found in the file at `path`."""
        if isinstance(spec, (str, Path)):
            path, found, spec = spec, spec_at(spec), None
        spec = spec or found
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
        self._slots = slots = Slots(self._context, self._parallel)
        try:
            for answer in self._answers(tasks, slots):
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
        # At the interpreter's end modules and llama.cpp's functions go, and the memory by itself.
        if sys and not sys.is_finalizing():
            self.close()

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _answers(self, tasks: Iterable[Task], slots: Slots) -> Iterator[tuple[int, list[Sample] | Exception]]:
        for index, task in self._sorted(tasks):
            try:
                jobs = self._jobs(index, task)
            except ValueError as error:
                yield index, error
                continue
            for job in jobs:
                while not slots.take(job, self._ids(job)):
                    yield from self._step(slots)
        while slots.busy:
            slots.close_gap()
            yield from self._step(slots)

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
            writing = Writing(self.spec, self.vocabulary, seed, room)
            given = None if task.reasonings is None else list(task.reasonings[number])
            jobs.append(_Job(index, number, samples, list(task.prompt), writing, given))
        return jobs

    def _ids(self, job: _Job) -> list[int]:
        """What the next logits of a job are read after."""
        if job.reasoning is None:
            return job.prompt
        return [*job.prompt, *job.reasoning, *self.spec.marker_ids]

    def _step(self, slots: Slots) -> list[tuple[int, list[Sample]]]:
        """Decode once and let the slots go on; returns the answers that this completes."""
        answers = []
        for slot, row in slots.decode():
            job, logits = slot.job, self._context.logits(row)
            if job.reasoning is None:
                token = job.writing.write(logits)
                if job.writing.done:
                    slots.hold(slot, self._ids(job))
                else:
                    slot.ids.append(token)
                continue
            scores = label_log_probabilities(logits, self.spec.label_ids)
            job.samples[job.number] = Sample(job.reasoning, job.writing.truncated, scores)
            slot.job = None
            if all(job.samples):
                answers.append((job.index, job.samples))
        return answers
