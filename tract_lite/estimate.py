"""How long a run will take, from a few measured steps."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, Sequence

from tract_lite.encode import encode_records
from tract_lite.judge import Judge
from tract_lite.records import Record
from tract_lite.settings import TrainSettings
from tract_lite.spec import JudgeSpec
from tract_lite.trainer import CotRaftTrainer
from tract_lite.vocabulary import TransformersVocabulary

MEASURED_BATCHES = 3
MEASURED_TOKENS = 16


def run_seconds(model: Any, tokenizer: Any, records: Sequence[Record], spec: JudgeSpec,
                settings: TrainSettings, batch_size: int) -> dict[str, float]:
    """Seconds that one `stage` and the self-generated `reasonings` will take.

    Trains nothing: the measured passes change no weights. `model` has a new adapter.

    Raises:
        ValueError: no record can be trained on.
    """
    examples, dropped = encode_records(records, spec, TransformersVocabulary(tokenizer))
    if not examples:
        raise ValueError(f"no record can be trained on, out of {len(records)}: {dict(dropped)}")
    with TemporaryDirectory() as folder:
        trainer = CotRaftTrainer(model, examples, spec, tokenizer, Path(folder), settings)
        stage = _stage_seconds(trainer)
    reasoning = fmean(len(example.ids) - example.prompt_length for example in examples)

    def batch_seconds(new_tokens: int) -> float:
        sampling = dataclasses.replace(spec.sampling, max_new_tokens=new_tokens)
        short = dataclasses.replace(spec, sampling=sampling)
        start = time.perf_counter()
        for _ in Judge.from_model(model, tokenizer, short, batch_size).score_many(
                records[:batch_size]):
            pass
        return time.perf_counter() - start

    batch_seconds(1)  # warms up
    prompt = batch_seconds(1)
    token = max(0.0, batch_seconds(1 + MEASURED_TOKENS) - prompt) / MEASURED_TOKENS
    batches = -(-len(records) // batch_size)
    return {"stage": stage, "reasonings": batches * (prompt + token * reasoning)}


def _stage_seconds(trainer: CotRaftTrainer) -> float:
    batches = iter(trainer.get_train_dataloader())
    tokens = seconds = 0.0
    for number in range(1 + MEASURED_BATCHES):
        step, _ = trainer.get_batch_samples(batches, 1, trainer.args.device)
        if not step:
            break
        start = time.perf_counter()
        trainer.training_step(trainer.model, step[0], num_items_in_batch=1)
        trainer.model.zero_grad()
        # The first pass warms up, unless it is the only one there is.
        if number == 1:
            tokens = seconds = 0.0
        tokens += int(step[0]["attention_mask"].sum())
        seconds += time.perf_counter() - start
    return seconds / tokens * trainer.total_tokens
