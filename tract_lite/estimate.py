"""How long a run will take, from a few seconds of it."""

import logging
import random
import time
from dataclasses import replace
from functools import partial
from os.path import commonprefix
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import torch

from tract_lite.engines.pace import measure_length, measure_pace
from tract_lite.engines.task import Task, room_for
from tract_lite.export.reasoning_judge import LLAMA_CPP, TRANSFORMERS, Openers, open_fastest, open_in_llama_cpp
from tract_lite.judge import Judge
from tract_lite.prompt import prompt_ids
from tract_lite.record import Record
from tract_lite.spec import JudgeSpec
from tract_lite.training.encode import Example, collate, encode_records
from tract_lite.training.quiet import progress, quieter
from tract_lite.training.seed_model import add_lora, for_training, free_memory, open_seed_model
from tract_lite.training.settings import TrainSettings
from tract_lite.training.trainer import CotRaftTrainer
from tract_lite.vocabulary import TransformersVocabulary

logger = logging.getLogger(__name__)

MEASURING = "measuring how long this takes"
# How many records stand for all of them, and the seconds that each thing is measured for.
SAMPLE, SECONDS, TRAINING_SECONDS = 128, 4.0, 8.0
# Weights of up to so many bytes are converted for llama.cpp in a few seconds.
SMALL_BYTES = 10**9
# What a pass without gradients takes of one with them.
FORWARD_SHARE = 0.4
# Where in the examples, sorted by length, micro-batches are taken from.
QUANTILES = (0.5, 0.9, 0.1, 0.7, 0.3)
# Tokens of the first pass and items of the first trial, and how many times as many each next one
# has, while there is time.
FIRST_TOKENS, FEW, GROWTH = 64, 4, 4
# Seconds to start what an export runs, and for each GB of the seed model; how many times as long
# transformers reads in float32, which the export is checked with.
EXPORT_START, EXPORT_GB, FLOAT32 = 15.0, 40.0, 2.0


class Ending(NamedTuple):
    """What follows the training of a run: how many items are held out, and how many of them the
    untrained seed model judges (in both ways), each GGUF file, and the check of each; the files."""

    held_out: int
    untrained: int
    by_file: int
    checked: int
    files: int


class _Paces(NamedTuple):
    """Mean seconds for an item by the engine that writes: to read its prompt, to judge it after a
    reasoning like the data's, after one like the seed model's own, and with an adapter in
    transformers; and how many tokens the seed model's own reasonings have."""

    read: float
    written: float
    own: float
    adapter: float
    length: float


def estimate_run(
    records: Sequence[Record],
    settings: TrainSettings,
    *,
    parallel: int | None,
    validation: Sequence[Record] = (),
    ending: Mapping[str, int] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Seconds that one `stage` on the records will take and, unless it is direct, the `reasonings`
    between two stages and the `seed_reasonings` before them for the records that have none; with
    an `ending` (the fields of `Ending`) also the `export` and the `evaluation`.

    Trains nothing: about ten seconds of training are measured, and of writing with the engine that
    will write. Of a large seed model whose file is not needed later, the speed of transformers is
    taken, which is lower. `options` are those of `train_adapter`; `parallel` as for
    `reasoning_judge`, None for a stage alone.
    Raises ValueError: no record can be trained on.
    """
    # The steps of the run say again what they are made from, and what can't be done here.
    with quieter("", logging.ERROR):
        seconds = _measure(records, settings, parallel, validation, Ending(**ending) if ending else None, **options)
    free_memory()
    _tell(seconds)
    return seconds


def _measure(
    records: Sequence[Record],
    settings: TrainSettings,
    parallel: int | None,
    validation: Sequence[Record],
    end: Ending | None,
    **options: Any,
) -> dict[str, float]:
    is_direct, checkpointing = settings.direct_share == 1, options.pop("gradient_checkpointing", True)
    start = time.perf_counter()
    model, tokenizer, spec = open_seed_model(**options)
    opened = time.perf_counter() - start
    model = add_lora(model, gradient_checkpointing=checkpointing)
    if parallel is None and not is_direct:
        # Nobody writes what is lacking.
        records = [record for record in records if not _lacks(record)] or records
    sample = random.Random(0).sample(list(records), min(SAMPLE, len(records)))
    lacking = 0 if parallel is None or is_direct else sum(map(_lacks, [*records, *validation]))
    encode = partial(_examples, sample, spec, TransformersVocabulary(tokenizer))
    paces = _Paces(0.0, 0.0, 0.0, 0.0, 1.0)
    if parallel is not None and (end or not is_direct):
        by_transformers = partial(Judge.from_model, model, tokenizer, spec, parallel)
        ways = {LLAMA_CPP: partial(open_in_llama_cpp, **options), TRANSFORMERS: by_transformers}
        on_cpu, is_small = not torch.cuda.is_available(), model.get_memory_footprint() <= SMALL_BYTES
        if not (lacking or end and on_cpu or is_small and not is_direct):
            # No file of the seed model alone is needed later.
            del ways[LLAMA_CPP]
        ending = "" if end is None else "direct" if is_direct else "reasoned"
        paces = _paces(ways, encode, sample, lacks=bool(lacking), end=ending)
    for_training(model)
    examples = encode(paces.length, direct_share=settings.direct_share)
    count = max(1, round(len(examples) * len(records) / max(1, len(sample))))
    seconds: dict[str, float] = {}
    if parallel is not None and not is_direct:
        seconds["seed_reasonings"] = lacking * paces.written
        seconds["reasonings"] = (len(records) + len(validation)) * paces.written
    with TemporaryDirectory() as folder, progress(MEASURING):
        # Repeated, they are as many as there will be.
        repeated = (examples * -(-count // len(examples)))[:count]
        trainer = CotRaftTrainer(model, repeated, spec, tokenizer, Path(folder), settings)
        validations = len(validation) * -(-settings.steps(count) // settings.save_every)
        tokens = trainer.total_tokens / trainer.args.world_size
        tokens += FORWARD_SHARE * validations * fmean(len(example.ids) for example in examples)
        each = _token_seconds(trainer, examples, tokenizer.pad_token_id)
        seconds["stage"] = opened + tokens * each
    if end:
        # By transformers, whole examples.
        read = FORWARD_SHARE * each * fmean(len(example.ids) for example in examples)
        seconds["export"] = EXPORT_START + EXPORT_GB * model.get_memory_footprint() / 10**9
        seconds["export"] += FLOAT32 * (end.checked * read + FORWARD_SHARE * each * spec.max_length)
        seconds["export"] += end.files * end.checked * paces.read
        by_adapter, by_file = (read, paces.read) if is_direct else (2 * paces.adapter, paces.written)
        seconds["evaluation"] = end.untrained * (paces.read + paces.own) + opened * (1 if is_direct else 2)
        seconds["evaluation"] += end.held_out * by_adapter + end.files * end.by_file * by_file
    return seconds


def _paces(
    ways: Openers, encode: Callable[..., list[Example]], sample: Sequence[Record], *, lacks: bool, end: str
) -> _Paces:
    """What is measured of writing; reasonings that the sample lacks are as long as its own are.

    `end`: what follows, "" for nothing, else how the trained judge answers, "direct" or "reasoned".
    """
    prompts = [example.ids[: example.prompt_length] for example in encode(1.0)]
    count, whole = len(prompts), list(map(len, prompts))
    with open_fastest(ways, sample) as judge, progress(MEASURING):
        # Whatever else runs here for a moment makes it slower.
        measured = [measure_pace(judge.engine, prompts, SECONDS / 2) for _ in range(2)]
        pace = by_adapter = min(measured, key=lambda one: one.prompt)
        length = measure_length(judge.engine, prompts, pace, SECONDS) if lacks or end else 1.0
        tokens = _unshared(prompts) if "parallel" in judge.engine.shape else whole
        read, expected = pace.prompt * fmean(tokens), pace.seconds(tokens, [round(length)] * count) / count
        read, own = (_trial(judge, sample, *way) if end else way[1] for way in ((0, read), (1, expected)))
    if end == "reasoned" and LLAMA_CPP in ways:
        with ways[TRANSFORMERS]() as judge:
            by_adapter = measure_pace(judge.engine, prompts, SECONDS)
    lengths = [len(one.ids) - one.prompt_length for one in encode(length)]
    written = pace.seconds(tokens, lengths) / count * own / expected
    return _Paces(read, written, own, by_adapter.seconds(whole, lengths) / count, length)


def _trial(judge: Judge, records: Sequence[Record], n_cot: int, expected: float) -> float:
    """Seconds for each of ever more records, while there is time; as `expected` where there is not
    even for a few."""
    count, spent, each = min(FEW, len(records)), 0.0, expected
    while spent + count * each < SECONDS:
        start = time.perf_counter()
        list(judge.score_many(records[:count], n_cot))
        each = (time.perf_counter() - start) / count
        spent += each * count
        if count == len(records):
            break
        count = min(GROWTH * count, len(records))
    return each


def _unshared(prompts: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens of each prompt are read where what several begin with is read once."""
    ordered = sorted(map(list, prompts))
    return [len(one) - len(commonprefix([before, one])) for before, one in zip([[], *ordered], ordered)]


def _tell(seconds: Mapping[str, float]) -> None:
    """Say what was found, in a line."""
    if seconds.keys() == {"stage"}:
        logger.info("this stage takes about %s minutes", _minutes(seconds["stage"]))
        return
    parts = {
        "the seed model's reasonings": seconds.get("seed_reasonings", 0.0),
        "training": seconds["stage"] * (2 if "reasonings" in seconds else 1),
        "reasonings between the stages": seconds.get("reasonings", 0.0),
        "export": seconds.get("export", 0.0),
        "evaluation": seconds.get("evaluation", 0.0),
    }
    shown = ", ".join(f"{name} {_minutes(value)}" for name, value in parts.items() if value)
    logger.info("this run takes about %s minutes (%s)", _minutes(sum(parts.values())), shown)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}" if seconds >= 600 else f"{seconds / 60:.1f}"


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
    """Seconds of training for a token, by whole micro-batches; where time allows only pieces of
    one, by these, of which each takes some time however short it is."""
    ordered, size = sorted(examples, key=lambda example: len(example.ids)), trainer.settings.micro_batch_size
    room, spent, tokens, seconds = FIRST_TOKENS, 0.0, 0, 0.0
    quantiles, pieces = list(QUANTILES), []
    _pass_seconds(trainer, [_cut(ordered[0], room)], pad_id)  # warms up
    while quantiles:
        place = int(quantiles[0] * max(0, len(ordered) - size))
        batch = ordered[place : place + size]
        whole = sum(len(example.ids) for example in batch)
        if whole > room:
            batch = [_cut(example, room // len(batch)) for example in batch]
        count, last = sum(len(example.ids) for example in batch), _pass_seconds(trainer, batch, pad_id)
        spent += last
        if whole > room:
            pieces.append((count, last))
            room, ahead = room * GROWTH, last * GROWTH
        else:
            tokens, seconds, ahead = tokens + count, seconds + last, last
            quantiles.pop(0)
        if spent + ahead > TRAINING_SECONDS:
            break
    if tokens:
        return seconds / tokens
    (first_count, first), (count, last) = pieces[0], pieces[-1]
    slope = max(0.0, last - first) / (count - first_count) if count > first_count else last / count
    return (last + slope * (whole - count)) / whole


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
