"""A transformers model as an engine: reasonings and scores, batch by batch."""

from itertools import islice
from typing import Any, Iterable, Mapping, Sequence

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, LogitsProcessorList

from tract_lite.engines.sampler import Job, Writing, jobs_of
from tract_lite.engines.task import Answers, Engine, Task
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import TransformersVocabulary

# Tasks are taken from the input in windows of this many batches and sorted by length inside one.
WINDOW_BATCHES = 8


class TransformersEngine(Engine):
    """Answers tasks with a causal language model, `batch_size` sequences at once.

    `identity`: what tells this model from others, such as the fingerprint of its weights.
    """

    def __init__(
        self, model: Any, tokenizer: Any, spec: JudgeSpec, batch_size: int = 16, identity: Mapping | None = None
    ):
        self.model, self.spec, self.batch_size = model.eval(), spec, batch_size
        self.vocabulary = TransformersVocabulary(tokenizer)
        self._pad_id = spec.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.identity = dict(identity or {})
        self.shape = {"batch_size": batch_size, "dtype": str(model.dtype).removeprefix("torch.")}
        spec.check_vocabulary(self.vocabulary)

    def run(self, tasks: Iterable[Task]) -> Answers:
        """The answers of tasks with their index in the input, as they are completed.

        A task that does not fit in the spec's `max_length` is answered with a ValueError.
        """
        numbered = enumerate(tasks)
        while window := list(islice(numbered, self.batch_size * WINDOW_BATCHES)):
            jobs: list[Job] = []
            for index, task in window:
                try:
                    jobs += jobs_of(index, task, self.spec, self.vocabulary, self.spec.max_length)
                except ValueError as error:
                    yield index, error
            # What is only read does not wait for what is written.
            jobs.sort(key=lambda job: (job.reasoning is None, len(job.ids)))
            for start in range(0, len(jobs), self.batch_size):
                batch = jobs[start : start + self.batch_size]
                self._judge(batch)
                for job in batch:
                    yield from job.complete()

    def close(self) -> None:
        """Let go of the model."""
        self.model = None

    @torch.inference_mode()
    def _judge(self, jobs: Sequence[Job]) -> None:
        """Write the reasonings that are not there, and read the labels' log-probabilities.

        Labels of several tokens take further passes, each node of their tree a row.
        """
        if unwritten := [job for job in jobs if job.reasoning is None]:
            self._write(unwritten)
        while wanted := [(job, node) for job in jobs for node in job.reading.wanted][: self.batch_size]:
            logits = self._logits([job.ids_at(node) for job, node in wanted])
            for (job, node), row in zip(wanted, logits):
                job.reading.add_logits(node, row)

    def _logits(self, sequences: Sequence[list[int]]) -> np.ndarray:
        """The logits (B, V) after each sequence."""
        ids, mask = self._pad_left(sequences)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits[:, -1]
        return logits.float().cpu().numpy()

    def _write(self, jobs: Sequence[Job]) -> None:
        """Let the model continue the prompts until each reasoning is done."""
        ids, mask = self._pad_left([job.ids for job in jobs])
        rows = [job.writing for job in jobs]
        ends = {"pad_token_id": self._pad_id, "eos_token_id": self.spec.eos_id}
        config = GenerationConfig(do_sample=False, max_new_tokens=max(row.room for row in rows), **ends)
        writer = LogitsProcessorList([_Writer(rows, self.spec.eos_id)])
        # transformers would fill what our settings leave open with the seed's own defaults.
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        defaults, model.generation_config = model.generation_config, GenerationConfig()
        try:
            self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=writer)
        finally:
            model.generation_config = defaults
        for job in jobs:
            job.reasoning = job.writing.ids

    def _pad_left(self, sequences: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), self._pad_id)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, longest - len(sequence) :] = torch.tensor(sequence)
            mask[row, longest - len(sequence) :] = 1
        return ids.to(self.model.device), mask.to(self.model.device)


class _Writer(LogitsProcessor):
    """Leaves of each row's logits the one token that its own sampler draws.

    Rows then do not depend on what is sampled beside them, and llama.cpp's follow the same rule.
    """

    def __init__(self, rows: Sequence[Writing], eos_id: int):
        self._rows, self._eos_id = rows, eos_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float().cpu().numpy()
        tokens = [[self._eos_id if row.done else row.write(logits[n])] for n, row in enumerate(self._rows)]
        picked = torch.tensor(tokens, device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, picked, 0.0)
