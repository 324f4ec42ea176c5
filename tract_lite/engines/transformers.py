"""A transformers model as an engine: reasonings and scores, batch by batch."""

from __future__ import annotations

from itertools import islice
from typing import Any, Iterable, Iterator, Mapping, Sequence

import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tract_lite.engines.sampler import Writing
from tract_lite.engines.task import Sample, Task, room_for
from tract_lite.rail import label_log_probabilities
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import TransformersVocabulary

# Tasks are taken from the input in windows of this many batches and sorted by length inside one.
WINDOW_BATCHES = 8


class TransformersEngine:
    """Answers tasks with a causal language model, `batch_size` sequences at once.

    `identity`: what tells this model from others, such as the fingerprint of its weights.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        spec: JudgeSpec,
        batch_size: int = 16,
        identity: Mapping[str, Any] | None = None,
    ):
        self.model, self.spec, self.batch_size = model.eval(), spec, batch_size
        self.vocabulary = TransformersVocabulary(tokenizer)
        pad_id = tokenizer.pad_token_id
        self._pad_id = spec.eos_id if pad_id is None else pad_id
        self.identity = dict(identity or {})
        self.shape = {"batch_size": batch_size, "dtype": str(model.dtype).removeprefix("torch.")}
        spec.check_vocabulary(self.vocabulary)

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[int, list[Sample] | Exception]]:
        """The answer of each task with its index in the input, as they are completed.

        A task that does not fit in the spec's `max_length` is answered with a ValueError.
        """
        numbered = enumerate(tasks)
        while window := list(islice(numbered, self.batch_size * WINDOW_BATCHES)):
            rows: list[tuple[int, int, Task, int]] = []
            answers: dict[int, list[Any]] = {}
            for index, task in window:
                try:
                    room = room_for(task, self.spec, self.spec.max_length)
                except ValueError as error:
                    yield index, error
                    continue
                answers[index] = [None] * len(task.seeds)
                rows += [(index, number, task, room) for number in range(len(task.seeds))]
            rows.sort(key=lambda row: len(row[2].prompt))
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                for (index, number, *_), sample in zip(batch, self._answer(batch)):
                    answers[index][number] = sample
                    if all(answers[index]):
                        yield index, answers[index]

    def close(self) -> None:
        """Let go of the model."""
        self.model = None

    @torch.inference_mode()
    def _answer(self, rows: Sequence[tuple[int, int, Task, int]]) -> list[Sample]:
        prompts = [list(task.prompt) for _, _, task, _ in rows]
        if rows[0][2].reasonings is None:
            written = [Writing(self.spec, self.vocabulary, task.seeds[number], room) for _, number, task, room in rows]
            self._write(prompts, written)
            reasonings = [row.ids for row in written]
            truncated = [row.truncated for row in written]
        else:
            reasonings = [list(task.reasonings[number]) for _, number, task, _ in rows]
            truncated = [False] * len(rows)
        marker = list(self.spec.marker_ids)
        ids, mask = self._pad_left([p + r + marker for p, r in zip(prompts, reasonings)])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits[:, -1]
        scores = label_log_probabilities(logits.float().cpu().numpy(), self.spec.label_ids)
        return [Sample(*fields) for fields in zip(reasonings, truncated, scores)]

    def _write(self, prompts: list[list[int]], rows: Sequence[Writing]) -> None:
        """Let the model continue its prompts until each reasoning is done."""
        ids, mask = self._pad_left(prompts)
        # transformers would fill what our settings leave open with the seed's own defaults.
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        defaults, model.generation_config = model.generation_config, GenerationConfig()
        try:
            self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max(row.room for row in rows),
                    pad_token_id=self._pad_id,
                    eos_token_id=self.spec.eos_id,
                ),
                logits_processor=LogitsProcessorList([_Writer(rows, self._pad_id)]),
                stopping_criteria=StoppingCriteriaList([_AllWritten(rows)]),
            )
        finally:
            model.generation_config = defaults

    def _pad_left(self, sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
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

    def __init__(self, rows: Sequence[Writing], pad_id: int):
        self.rows, self._pad_id = rows, pad_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float().cpu().numpy()
        tokens = [[self._pad_id if row.done else row.write(logits[n])] for n, row in enumerate(self.rows)]
        picked = torch.tensor(tokens, device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, picked, 0.0)


class _AllWritten(StoppingCriteria):
    """Tells which rows are done."""

    def __init__(self, rows: Sequence[Writing]):
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.tensor([row.done for row in self._rows], device=input_ids.device)
