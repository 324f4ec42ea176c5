"""How long a run will take, from a few seconds of it."""

import logging
import random
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, Sequence

import torch

from tract_lite.engines.pace import measure_length, measure_pace
from tract_lite.engines.task import Task, room_for
from tract_lite.export.reasoning_judge import LLAMA_CPP, TRANSFORMERS, open_fastest, open_in_llama_cpp
from tract_lite.judge import Judge
from tract_lite.prompt import prompt_ids
from tract_lite.record import Record
from tract_lite.spec import JudgeSpec
from tract_lite.training.encode import Example, collate, encode_records
from tract_lite.training.quiet import quieter
from tract_lite.training.seed_model import add_lora, for_training, free_memory, open_seed_model
from tract_lite.training.settings import TrainSettings
from tract_lite.training.trainer import CotRaftTrainer
from tract_lite.vocabulary import TransformersVocabulary

logger = logging.getLogger(__name__)

# How many records stand for all of them, and the seconds that each thing is measured for.
SAMPLE, SECONDS = 128, 4.0
# Weights of up to so many bytes are converted for llama.cpp in a few seconds.
SMALL_BYTES = 10**9
# What a pass without gradients takes of one with them.
FORWARD_SHARE = 0.4
# Where in the examples, sorted by length, micro-batches are taken from.
QUANTILES = (0.5, 0.9, 0.1, 0.7, 0.3)
# Tokens of the first pass, and how many times as many each next one has, while there is time.
FIRST_TOKENS, GROWTH = 64, 4


def estimate_run(
    records: Sequence[Record],
    settings: TrainSettings,
    *,
    parallel: int | None,
    validation: Sequence[Record] = (),
    **options: Any,
) -> dict[str, float]:
    """Seconds that one `stage` on the records will take, the `reasonings` between the stages, and
    the `seed_reasonings` before them for the records that have none.

    Trains nothing: about ten seconds of training and of writing are measured, with the engine that
    will write. Of a large seed model that llama.cpp will run, the speed of transformers is taken,
    which is lower. `options` are those of `train_adapter`; `parallel` as for `reasoning_judge`,
    None for a stage alone.
    Raises ValueError: no record can be trained on.
    """
    logger.info("measuring how long this takes ...")
    # The stages say again what they are made from.
    with quieter("training", logging.WARNING):
        seconds = _measure(records, settings, parallel, validation, **options)
    free_memory()
    _tell(seconds)
    return seconds


def _measure(
    records: Sequence[Record],
    settings: TrainSettings,
    parallel: int | None,
    validation: Sequence[Record],
    **options: Any,
) -> dict[str, float]:
    checkpointing = options.pop("gradient_checkpointing", True)
    start = time.perf_counter()
    model, tokenizer, spec = open_seed_model(**options)
    opened = time.perf_counter() - start
    model = add_lora(model, gradient_checkpointing=checkpointing)
    sample = random.Random(0).sample(list(records), min(SAMPLE, len(records)))
    share, lacking = len(records) / max(1, len(sample)), sum(map(_lacks, [*records, *validation]))
    if parallel is None:
        # Nobody writes what is lacking.
        sample = [record for record in sample if not _lacks(record)] or sample
        share, lacking = len(records) / max(1, len(sample)), 0
    encode = partial(_examples, sample, spec, TransformersVocabulary(tokenizer))
    seconds: dict[str, float] = {}
    length = 1.0
    if parallel is not None:
        prompts = [example.ids[: example.prompt_length] for example in encode(length)]
        by_transformers = partial(Judge.from_model, model, tokenizer, spec, parallel)
        ways = {LLAMA_CPP: partial(open_in_llama_cpp, **options), TRANSFORMERS: by_transformers}
        if not lacking and model.get_memory_footprint() > SMALL_BYTES:
            # No file of the seed model alone is needed later.
            del ways[LLAMA_CPP]
        with open_fastest(ways, sample) as judge:
            pace = measure_pace(judge.engine, prompts, SECONDS)
            length = measure_length(judge.engine, prompts, pace, SECONDS) if lacking else length
        lengths = [len(example.ids) - example.prompt_length for example in encode(length)]
        each = pace.seconds(list(map(len, prompts)), lengths) / len(prompts)
        seconds["seed_reasonings"] = lacking * each
        seconds["reasonings"] = (len(records) + len(validation)) * each
    for_training(model)
    examples = encode(length, direct_share=settings.direct_share)
    count = max(1, round(len(examples) * share))
    with TemporaryDirectory() as folder:
        # Repeated, they are as many as there will be.
        repeated = (examples * -(-count // len(examples)))[:count]
        trainer = CotRaftTrainer(model, repeated, spec, tokenizer, Path(folder), settings)
        validations = len(validation) * -(-settings.steps(count) // settings.save_every)
        tokens = trainer.total_tokens / trainer.args.world_size
        tokens += FORWARD_SHARE * validations * fmean(len(example.ids) for example in examples)
        seconds["stage"] = opened + tokens * _token_seconds(trainer, examples, tokenizer.pad_token_id)
    return seconds


def _tell(seconds: dict[str, float]) -> None:
    minutes = {name: value / 60 for name, value in seconds.items()}
    if "reasonings" not in minutes:
        logger.info("this stage takes about %.1f minutes", minutes["stage"])
        return
    parts = f"{minutes['stage']:.1f} for each stage, {minutes['reasonings']:.1f} for the reasonings between them"
    if minutes["seed_reasonings"]:
        parts = f"{minutes['seed_reasonings']:.1f} for the seed model's reasonings, {parts}"
    whole = sum(minutes.values()) + minutes["stage"]
    logger.info("this run takes about %.1f minutes: %s; export and evaluation come on top", whole, parts)


def _lacks(record: Record) -> bool:
    return not (record.feedback or record.feedback_ids)


def _examples(
    records: Sequence[Record],
    spec: JudgeSpec,
    vocabulary: TransformersVocabulary,
    length: float,
    direct_share: float = 0.0,
) -> list[Example]:
    """The records' examples; where a record lacks a reasoning, with one of that length."""

    def filled_in(record: Record) -> Record:
        try:
            room = room_for(Task(prompt_ids(record, spec, vocabulary), [0]), spec, spec.max_length)
        except ValueError:
            return record
        return replace(record, feedback_ids=spec.label_ids[0][:1] * max(1, min(round(length), room)))

    filled = [filled_in(record) if _lacks(record) else record for record in records]
    return encode_records(filled, spec, vocabulary, direct_share=direct_share, required=True)[0]


def _token_seconds(trainer: CotRaftTrainer, examples: Sequence[Example], pad_id: int) -> float:
    """Seconds of training for a token, by whole micro-batches, or as much of one as time allows."""
    ordered, size = sorted(examples, key=lambda example: len(example.ids)), trainer.settings.micro_batch_size
    room, spent, each, tokens, seconds = FIRST_TOKENS, 0.0, 0.0, 0, 0.0
    quantiles = list(QUANTILES)
    _pass_seconds(trainer, [_cut(ordered[0], room)], pad_id)  # warms up
    while quantiles:
        place = int(quantiles[0] * max(0, len(ordered) - size))
        batch = ordered[place : place + size]
        is_cut = sum(len(example.ids) for example in batch) > room
        if is_cut:
            batch = [_cut(example, room // len(batch)) for example in batch]
        count, last = sum(len(example.ids) for example in batch), _pass_seconds(trainer, batch, pad_id)
        spent += last
        if is_cut:
            room, each, ahead = room * GROWTH, last / count, last * GROWTH
        else:
            tokens, seconds, ahead = tokens + count, seconds + last, last
            quantiles.pop(0)
        if spent + ahead > SECONDS:
            break
    return seconds / tokens if tokens else each


def _cut(example: Example, room: int) -> Example:
    """The last tokens of an example, as many as fit into `room`."""
    drop = min(max(0, len(example.ids) - room), example.score_position - 1)
    start, score = max(1, example.prompt_length - drop), example.score_position - drop
    return replace(example, ids=example.ids[drop:], prompt_length=start, score_position=score)


def _pass_seconds(trainer: CotRaftTrainer, examples: Sequence[Example], pad_id: int) -> float:
    """Seconds of a pass with gradients, which change nothing."""
    batch: dict[str, Any] = collate(examples, pad_id)
    batch |= {"num_tokens": batch["attention_mask"].sum().float(), "num_sequences": torch.tensor(float(len(examples)))}
    start = time.perf_counter()
    trainer.training_step(trainer.model, batch, num_items_in_batch=1).item()
    trainer.model.zero_grad()
    return time.perf_counter() - start
