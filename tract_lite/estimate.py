"""How long a run will take, from a few measured steps."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, Sequence

from tract_lite.judge import Judge
from tract_lite.record import Record
from tract_lite.training.encode import encode_records
from tract_lite.training.seed_model import add_lora, open_seed_model
from tract_lite.training.settings import TrainSettings
from tract_lite.training.trainer import CotRaftTrainer
from tract_lite.vocabulary import TransformersVocabulary

logger = logging.getLogger(__name__)

MEASURED_BATCHES, MEASURED_TOKENS = 3, 16


def estimate_run(
    records: Sequence[Record], settings: TrainSettings, *, parallel: int, **options: Any
) -> dict[str, float]:
    """Seconds that one `stage` on the records and the `reasonings` between the stages will take.

    Trains nothing: a few passes of a new adapter are measured. `options` are those of
    `train_adapter`; `parallel` reasonings are written at once.
    Raises ValueError: no record can be trained on.
    """
    checkpointing = options.pop("gradient_checkpointing", True)
    model, tokenizer, spec = open_seed_model(**options)
    model = add_lora(model, gradient_checkpointing=checkpointing)
    examples, _ = encode_records(records, spec, TransformersVocabulary(tokenizer), required=True)
    with TemporaryDirectory() as folder:
        trainer = CotRaftTrainer(model, examples, spec, tokenizer, Path(folder), settings)
        stage = _stage_seconds(trainer)

    def batch_seconds(new_tokens: int) -> float:
        sampling = replace(spec.sampling, max_new_tokens=new_tokens)
        judge = Judge.from_model(model, tokenizer, replace(spec, sampling=sampling), parallel)
        start = time.perf_counter()
        list(judge.score_many(records[:parallel]))
        return time.perf_counter() - start

    batch_seconds(1)  # warms up
    prompt = batch_seconds(1)
    token = max(0.0, batch_seconds(1 + MEASURED_TOKENS) - prompt) / MEASURED_TOKENS
    batches = -(-len(records) // parallel)
    length = fmean(len(example.ids) - example.prompt_length for example in examples)
    reasonings = batches * (prompt + token * length)
    parts = "%.1f for each stage, %.1f for the reasonings between them; export and evaluation come on top"
    minutes = [seconds / 60 for seconds in (2 * stage + reasonings, stage, reasonings)]
    logger.info(f"this run takes about %.1f minutes: {parts}", *minutes)
    return {"stage": stage, "reasonings": reasonings}


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
