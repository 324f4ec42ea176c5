"""Sampling and score reading with a transformers model; the counterpart of `engine.py`."""

from __future__ import annotations

from itertools import islice
from typing import Any, Iterable, Iterator, Sequence

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tract_lite.prompt import Reasoning
from tract_lite.rail import label_log_probabilities
from tract_lite.sampling import Sample, Task, room_for
from tract_lite.spec import JudgeSpec, Sampling
from tract_lite.vocabulary import TransformersVocabulary

# Tasks are taken from the input in windows of this many batches and sorted by length inside one.
WINDOW_BATCHES = 8


class TransformersEngine:
    """Answers tasks with a causal language model, `batch_size` sequences at once."""

    def __init__(self, model: Any, tokenizer: Any, spec: JudgeSpec, batch_size: int = 16):
        self.model, self.spec, self.batch_size = model.eval(), spec, batch_size
        self.vocabulary = TransformersVocabulary(tokenizer)
        self._pad_id = tokenizer.pad_token_id
        if self._pad_id is None:
            self._pad_id = spec.eos_id
        spec.check_vocabulary(self.vocabulary)

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[int, list[Sample] | Exception]]:
        """The answer of each task with its index in the input, as they are completed.

        A task that does not fit in the spec's `max_length` is answered with a ValueError.
        """
        numbered = enumerate(tasks)
        while window := list(islice(numbered, self.batch_size * WINDOW_BATCHES)):
            rows, answers = [], {}
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
        self.model = None

    @torch.inference_mode()
    def _answer(self, rows: Sequence[tuple[int, int, Task, int]]) -> list[Sample]:
        prompts = [list(task.prompt) for _, _, task, _ in rows]
        if rows[0][2].reasonings is None:
            seeds = [task.seeds[number] for _, number, task, _ in rows]
            reasonings, truncated = self._sample(prompts, seeds, [room for *_, room in rows])
        else:
            reasonings = [list(task.reasonings[number]) for _, number, task, _ in rows]
            truncated = [False] * len(rows)
        marker = list(self.spec.marker_ids)
        joined = [p + reasoning + marker for p, reasoning in zip(prompts, reasonings)]
        ids, mask = self._pad_left(joined)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1
        ).logits[:, -1].float().cpu().numpy()
        scores = label_log_probabilities(logits, self.spec.label_ids)
        return [Sample(*fields) for fields in zip(reasonings, truncated, scores)]

    def _sample(self, prompts: list[list[int]], seeds: Sequence[int],
                limits: Sequence[int]) -> tuple[list[list[int]], list[bool]]:
        ids, mask = self._pad_left(prompts)
        sampler = _SeededSampler(self.spec.sampling, seeds, ids.shape[1])
        stop = _EndOfReasoning([Reasoning(self.spec, self.vocabulary) for _ in prompts], limits)
        # transformers would fill what our settings leave open with the seed's own defaults.
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        defaults, model.generation_config = model.generation_config, GenerationConfig()
        try:
            self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=max(limits), pad_token_id=self._pad_id,
                    eos_token_id=self.spec.eos_id,
                ),
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        finally:
            model.generation_config = defaults
        return [reasoning.ids for reasoning in stop.reasonings], stop.truncated

    def _pad_left(self, sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), self._pad_id)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, longest - len(sequence):] = torch.tensor(sequence)
            mask[row, longest - len(sequence):] = 1
        return ids.to(self.model.device), mask.to(self.model.device)


class _SeededSampler(LogitsProcessor):
    """Leaves the one token that each row's own random numbers pick.

    Rows then do not depend on what is sampled beside them, as they would with one generator for
    the batch. The repetition penalty counts generated tokens only.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], prompt_length: int):
        self._sampling = sampling
        self._penalty = RepetitionPenaltyLogitsProcessor(
            sampling.repetition_penalty, prompt_ignore_length=prompt_length
        )
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = self._penalty(input_ids, scores.float())
        if self._sampling.temperature == 0:
            return scores
        picked = self._draw((scores / self._sampling.temperature).softmax(-1))
        return torch.full_like(scores, -torch.inf).scatter_(1, picked[:, None], 0.0)

    def _draw(self, probabilities: torch.Tensor) -> torch.Tensor:
        """A token (B,) from the nucleus of each row (B, V), by rejection: no row is sorted."""
        picked = torch.empty(len(probabilities), dtype=torch.long, device=probabilities.device)
        rows = torch.arange(len(probabilities), device=probabilities.device)
        while len(rows):
            left = probabilities[rows]
            cumulative = left.cumsum(-1, dtype=torch.float64)
            numbers = [[self._generators[row].random()] for row in rows.tolist()]
            points = torch.tensor(numbers, device=rows.device) * cumulative[:, -1:]
            # `right`: a token of probability 0 is never drawn, not even by the number 0.
            tokens = torch.searchsorted(cumulative, points, right=True)
            likelier = left.where(left > left.gather(1, tokens), 0.0).sum(-1)
            inside = likelier < self._sampling.top_p
            picked[rows[inside]] = tokens[inside, 0]
            rows = rows[~inside]
        return picked


class _EndOfReasoning(StoppingCriteria):
    """Ends each row at its marker, its end token or its own length limit."""

    def __init__(self, reasonings: list[Reasoning], limits: Sequence[int]):
        self.reasonings = reasonings
        self.truncated = [False] * len(reasonings)
        self._limits = limits
        self._done = [False] * len(reasonings)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self._done[row]:
                continue
            reasoning = self.reasonings[row]
            self._done[row] = reasoning.add(token)
            if not self._done[row] and len(reasoning.ids) >= self._limits[row]:
                self._done[row] = self.truncated[row] = True
        return torch.tensor(self._done, device=input_ids.device)
