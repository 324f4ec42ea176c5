"""llama.cpp: many sequences decoded at once over a shared prompt cache.

A slot is a sequence of llama.cpp's memory, and its work is always the same: decode those of its ids
that are not there yet. Sampling adds an id; a finished reasoning makes them prompt, cut reasoning
and marker; a new sample starts from the slot that holds most of its prompt. So the samples of an
item, and items under one rubric, share what was read before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import eq
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

from tract_lite.llama import Context, Sampler, load_model, quiet_llama, spec_of
from tract_lite.prompt import Reasoning
from tract_lite.rail import label_log_probabilities
from tract_lite.sampling import Sample, Task, room_for
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import GGUFVocabulary

# A shorter common prefix is read again: that is less work than copying a slot's memory.
MIN_SHARED = 32


@dataclass
class _Job:
    """One sample of a task. With a sampler it writes its reasoning, then its score is read."""

    index: int
    number: int
    samples: list[Sample | None]
    prompt: list[int]
    room: int
    reasoning: Reasoning
    sampler: Sampler | None
    truncated: bool = False


@dataclass
class _Slot:
    """A sequence of llama.cpp's memory, which holds the first `filled` of `ids`."""

    number: int
    ids: list[int] = field(default_factory=list)
    filled: int = 0
    job: _Job | None = None


class LlamaEngine:
    """Answers tasks with a GGUF model, up to `parallel` samples at once.

    `context_length`: tokens that one sample may take, by default the spec's `max_length` within
    what the model was trained for; the memory holds `parallel` times as many. `gpu_layers`: below 0
    for all. `flash_attention`: None leaves the choice to llama.cpp. `cache_type`: a type of
    llama.cpp, such as "f16", "f32" or "q8_0".

    Raises:
        ValueError: not a usable GGUF file, no judge spec, or the spec of another vocabulary.
        RuntimeError: llama.cpp can't hold that much.
    """

    _model = _context = None

    def __init__(self, path: str | Path, spec: JudgeSpec | None = None, *, parallel: int = 8,
                 threads: int | None = None, gpu_layers: int = -1,
                 context_length: int | None = None, flash_attention: bool | None = None,
                 cache_type: str = "f16"):
        self._llama = llama = quiet_llama()
        self._model = load_model(path, n_gpu_layers=gpu_layers)
        if llama.llama_model_is_recurrent(self._model) or llama.llama_model_is_hybrid(self._model):
            raise ValueError(f"{path} is a recurrent model, which can't be set back to its prompt")
        self.spec = spec or spec_of(self._model)
        if self.spec is None:
            raise ValueError(f"{path} holds no judge spec: export it with one, or give one")
        self.vocabulary = GGUFVocabulary(self._model)
        self.spec.check_vocabulary(self.vocabulary)
        self.context_length = context_length or min(
            self.spec.max_length, llama.llama_model_n_ctx_train(self._model))
        self._parallel = parallel
        self._slots: list[_Slot] = []
        self._context = Context(self._model, parallel, self.context_length, threads=threads,
                                flash_attention=flash_attention, cache_type=cache_type)

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[int, list[Sample] | Exception]]:
        """The answer of each task with its index in the input, as they are completed.

        A task that does not fit in the context is answered with a ValueError. Tasks are taken from
        the input as slots come free. A run shares nothing with the one before, so that the same
        tasks get the same answers.

        Raises:
            RuntimeError: the engine is closed or inside another run, or llama.cpp failed.
        """
        if self._slots or not self._context:
            raise RuntimeError("the engine is closed, or inside another run")
        self._context.clear()
        self._slots = [_Slot(number) for number in range(self._parallel)]
        try:
            for answer in self._answers(tasks):
                yield answer
                if not self._context:
                    raise RuntimeError("the engine was closed inside a run")
        finally:
            self._slots = []

    def close(self) -> None:
        """Free the model and its memory."""
        if self._context:
            self._context.close()
        if self._model:
            self._llama.llama_model_free(self._model)
        self._context = self._model = None

    __del__ = close

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _answers(self, tasks: Iterable[Task]) -> Iterator[tuple[int, list[Sample] | Exception]]:
        for index, task in enumerate(tasks):
            try:
                jobs = self._jobs(index, task)
            except ValueError as error:
                yield index, error
                continue
            for job in jobs:
                while not self._start(job):
                    yield from self._step()
        while any(slot.job for slot in self._slots):
            self._close_gap()
            yield from self._step()

    def _jobs(self, index: int, task: Task) -> list[_Job]:
        room = room_for(task, self.spec, self.context_length)
        jobs, samples = [], [None] * len(task.seeds)
        for number, seed in enumerate(task.seeds):
            reasoning, sampler = Reasoning(self.spec, self.vocabulary), None
            if task.reasonings is None:
                sampler = Sampler(self.spec.sampling, len(self.vocabulary), seed)
            else:
                reasoning.ids = list(task.reasonings[number])
            jobs.append(_Job(index, number, samples, list(task.prompt), room, reasoning, sampler))
        return jobs

    def _start(self, job: _Job) -> bool:
        """Give a job a slot; False where none is free, or what it shares is still being read."""
        free = [slot for slot in self._slots if not slot.job]
        if not free:
            return False
        shared = [_shared(slot.ids, job.prompt) for slot in self._slots]
        slot = max(free, key=lambda slot: shared[slot.number])
        best = max(self._slots, key=lambda slot: shared[slot.number])
        if shared[best.number] >= shared[slot.number] + MIN_SHARED:
            if best.filled < shared[best.number]:
                return False
            self._copy(best, slot)
        slot.job = job
        self._set_ids(slot)
        return True

    def _copy(self, source: _Slot, target: _Slot) -> None:
        self._context.copy(source.number, target.number)
        target.ids, target.filled = list(source.ids), source.filled

    def _set_ids(self, slot: _Slot) -> None:
        """Make a slot hold what its job needs next, keeping what is there already.

        The last id is always decoded, for its logits.
        """
        job, held = slot.job, slot.ids[:slot.filled]
        slot.ids = list(job.prompt)
        if not job.sampler:
            slot.ids += [*job.reasoning.ids, *self.spec.marker_ids]
        slot.filled = min(_shared(held, slot.ids), len(slot.ids) - 1)
        self._context.cut(slot.number, slot.filled)

    def _close_gap(self) -> None:
        """Move the last busy slot into a gap: llama.cpp decodes only neighbours together."""
        busy = [slot for slot in self._slots if slot.job]
        gap = next((slot for slot in self._slots if not slot.job), busy[-1])
        if gap.number < busy[-1].number:
            self._copy(busy[-1], gap)
            gap.job, busy[-1].job = busy[-1].job, None

    def _step(self) -> list[tuple[int, list[Sample]]]:
        """Decode once and let the slots go on; returns the answers that this completes."""
        answers = []
        for slot, row in self._decode():
            job = slot.job
            if job.sampler:
                self._write(slot, job.sampler.sample(self._context, row))
                continue
            scores = label_log_probabilities(self._context.logits(row), self.spec.label_ids)
            job.samples[job.number] = Sample(job.reasoning.ids, job.truncated, scores)
            slot.job = None
            if all(job.samples):
                answers.append((job.index, job.samples))
        return answers

    def _decode(self) -> list[tuple[_Slot, int]]:
        """Run one batch: every slot goes on by one id or, as there is room, by several.

        Returns the slots that hold all their ids now, with the batch row of their logits.
        """
        busy = [slot for slot in self._slots if slot.job]
        spare = self._context.batch_size - len(busy)
        tokens, positions, sequences, ready = [], [], [], []
        for slot in busy:
            ids = slot.ids[slot.filled : slot.filled + 1 + spare]
            spare -= len(ids) - 1
            tokens += ids
            positions += range(slot.filled, slot.filled + len(ids))
            sequences += [slot.number] * len(ids)
            slot.filled += len(ids)
            if slot.filled == len(slot.ids):
                ready.append((slot, len(tokens) - 1))
        self._context.decode(tokens, positions, sequences, [row for _, row in ready])
        return ready

    def _write(self, slot: _Slot, token: int) -> None:
        """Add a sampled token to a reasoning; where it ends there, go on to the marker."""
        job = slot.job
        complete = job.reasoning.add(token)
        job.truncated = not complete and len(job.reasoning.ids) >= job.room
        if complete or job.truncated:
            job.sampler = None
            self._set_ids(slot)
        else:
            slot.ids.append(token)


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """The length of the common prefix."""
    return [*map(eq, ids, others), False].index(False)
