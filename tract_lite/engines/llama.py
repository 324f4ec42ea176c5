"""llama.cpp as an engine: many sequences decoded at once over a shared prompt cache.

Each sample of a task works with a slot of `sequences.py`. Sampling adds an id to what the slot is
to hold; after the last one it is to hold prompt, reasoning and marker, and the score is read.
"""

import sys
from itertools import islice
from pathlib import Path
from typing import Any, Iterable, Iterator

from tract_lite.data.files import fingerprint
from tract_lite.engines.context import Context, memory_bytes
from tract_lite.engines.llama_cpp import check_generates, load_adapter, load_model, quiet_llama, spec_at, spec_of
from tract_lite.engines.sampler import jobs_of
from tract_lite.engines.sequences import Slots
from tract_lite.engines.task import Answers, Engine, Sample, Task
from tract_lite.engines.trial import check_runs
from tract_lite.engines.untrained import check_unasked, untrained_spec, untrained_spec_at
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec, SpecSource
from tract_lite.vocabulary import GGUFVocabulary

# Where `parallel` is left open: what the cache takes at most, and how many sequences there are. On
# a CPU a token costs a third less among 32 than among 16, and a tenth less again among 64.
CACHE_BYTES = 4 * 10**9
MAX_PARALLEL = 64
# Tasks are taken from the input in windows of this many times `parallel`, and sorted inside one.
WINDOW_PARALLEL = 2


def default_parallel(context_length: int, token_bytes: int, sequence_bytes: int = 0) -> int:
    """As many sequences as keep to `CACHE_BYTES`, 1 to 64; a token takes `token_bytes` of them."""
    return max(1, min(MAX_PARALLEL, CACHE_BYTES // (context_length * token_bytes + sequence_bytes)))


class LlamaEngine(Engine):
    """Answers tasks with a GGUF model, up to `parallel` samples at once.

    `spec`: a spec or the path of one; None for the one inside the file. `adapter`: a GGUF adapter
    on top of the file, which brings the spec; see `use_adapter`. `scale`, `template` and `chat` are
    for a file without a spec: see `untrained_spec`.

    `context_length`: tokens that one sample may take, by default the spec's `max_length` within
    what the model was trained for; the memory holds `parallel` times as many. `parallel`: None for
    what `default_parallel` gives. `threads`: None for all CPUs in reach. `gpu_layers`: below 0 for
    all. `flash_attention`: None leaves the choice to llama.cpp. `cache_type`: as in `Context`, such
    as "f16", "f32" or "q8_0". `repack`: keep a second copy of the weights in the processor's own
    order. A file is tried first, see `check_runs`.
    Raises ValueError: not a usable GGUF file, no judge spec, the spec of another vocabulary, or
        `repack` on a processor with AMX.
    Raises RuntimeError: llama.cpp can't hold that much.
    """

    # Of an engine that could not be made, there is nothing to free.
    _model: Any = None
    _context: Any = None

    def __init__(
        self,
        path: str | Path,
        spec: SpecSource | None = None,
        *,
        adapter: str | Path | None = None,
        scale: ScoreScale | None = None,
        template: str | None = None,
        chat: str | None = None,
        parallel: int | None = None,
        threads: int | None = None,
        gpu_layers: int = -1,
        context_length: int | None = None,
        flash_attention: bool | None = None,
        cache_type: str = "f16",
        repack: bool = False,
    ):
        self._slots: Slots | None = None
        self._llama = llama = quiet_llama()
        check_runs(path, gpu_layers)
        self._model = load_model(path, n_gpu_layers=gpu_layers, use_extra_bufts=repack)
        check_generates(self._model)
        self.vocabulary = GGUFVocabulary(self._model)
        self._adapters: dict[Path, tuple[Any, JudgeSpec | None]] = {}
        self.identity = {"fingerprint": fingerprint(path), "adapter": fingerprint(adapter) if adapter else None}
        pointer, found = self._adapter(adapter) if adapter else (None, spec_of(self._model))
        asked: dict[str, Any] = {"scale": scale, "template": template, "chat": chat}
        if isinstance(spec, (str, Path)) and not spec_at(spec):
            spec = untrained_spec_at(spec, **asked) or spec
        elif spec or found:
            check_unasked("this judge" if isinstance(spec, JudgeSpec) else spec or adapter or path, **asked)
        elif not adapter:
            spec = untrained_spec(self._model, path, **asked)
        self.spec = self._checked(spec, found, adapter or path)
        self.context_length = context_length or min(self.spec.max_length, llama.llama_model_n_ctx_train(self._model))
        if parallel is None:
            parallel = default_parallel(self.context_length, *memory_bytes(self._model))
        options: dict[str, Any] = {"flash_attention": flash_attention, "cache_type": cache_type}
        self._context = Context(self._model, parallel, self.context_length, threads=threads, **options)
        self._context.use_adapter(pointer)
        self.shape = {"model": Path(path).name, "parallel": parallel, "context_length": self.context_length}
        self.shape |= {"threads": self._context.threads, "batch_size": self._context.batch_size, "repack": repack}
        self.shape |= {"gpu_layers": gpu_layers, **options}
        self.shape |= {"llama_cpp_python": llama.__version__, "system": llama.llama_print_system_info().decode()}
        self._parallel = parallel

    def use_adapter(self, path: str | Path, spec: SpecSource | None = None) -> None:
        """Be the judge of another adapter from the next run on; the base is not loaded again.

        An adapter stays in memory until the engine is closed. The context length stays as it is.
        Raises ValueError: not an adapter on this base, or one without a spec for its vocabulary.
        Raises RuntimeError: the engine is closed or inside a run.
        """
        if self._slots or not self._context:
            raise RuntimeError("the engine is closed, or inside a run")
        pointer, found = self._adapter(path)
        self.spec = self._checked(spec, found, path)
        self.identity["adapter"] = fingerprint(path)
        self._context.use_adapter(pointer)

    def _adapter(self, path: str | Path) -> tuple[Any, JudgeSpec | None]:
        if (key := Path(path).resolve()) not in self._adapters:
            self._adapters[key] = load_adapter(self._model, path)
        return self._adapters[key]

    def _checked(self, spec: SpecSource | None, found: JudgeSpec | None, path: str | Path) -> JudgeSpec:
        """The spec that is given, or else the one that was found in the file at `path`."""
        if isinstance(spec, (str, Path)):
            path, spec = spec, spec_at(spec)
        elif spec is None:
            spec = found
        if spec is None:
            raise ValueError(f"{path} holds no judge spec: export it with one, or give one")
        spec.check_vocabulary(self.vocabulary)
        return spec

    def run(self, tasks: Iterable[Task]) -> Answers:
        """The answers of tasks with their index in the input, as they are completed.

        A task that does not fit in the context is answered with a ValueError. Tasks are taken from
        the input as slots come free, some ahead, since those that share most of their prompts are
        answered one after the other. A run shares nothing with the one before, so that the same
        tasks get the same answers.
        Raises RuntimeError: the engine is closed or inside another run, or llama.cpp failed.
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

    def _answers(self, tasks: Iterable[Task], slots: Slots) -> Answers:
        for index, task in self._sorted(tasks):
            try:
                jobs = jobs_of(index, task, self.spec, self.vocabulary, self.context_length)
            except ValueError as error:
                yield index, error
                continue
            for job in jobs:
                while not slots.take(job, job.ids, len(job.prompt) - 1):
                    yield from self._step(slots)
        while slots.busy:
            slots.close_gap()
            yield from self._step(slots)

    def _sorted(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Task]]:
        """The tasks with their numbers, in an order in which neighbours share long prefixes."""
        numbered, backwards = enumerate(tasks), False
        while window := list(islice(numbered, WINDOW_PARALLEL * self._parallel)):
            yield from sorted(window, key=lambda pair: list(pair[1].prompt), reverse=backwards)
            # The next window begins with what this one ends with.
            backwards = not backwards

    def _step(self, slots: Slots) -> list[tuple[int, list[Sample]]]:
        """Decode once and let the slots go on; returns the answers that this completes."""
        answers = []
        for slot, row in slots.decode():
            job, logits = slot.job, self._context.logits(row)
            if job.reasoning is None:
                slot.ids.append(job.writing.write(logits))
                if job.writing.done:
                    job.reasoning = job.writing.ids
                    slots.hold(slot, job.ids, comes_back=job.reading.branches)
                continue
            job.reading.add_logits(job.reading.wanted[-1], logits)
            if job.reading.wanted:
                slots.hold(slot, job.ids)
            else:
                answers += job.complete()
                slot.job = None
        return answers
