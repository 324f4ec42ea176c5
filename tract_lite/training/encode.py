"""Training examples: ids, what is supervised, where the score stands; and their batches.

A sequence is ids(prompt) + ids(reasoning) + marker + label + end token, as a judge meets it. A
direct one has no reasoning, and its marker is given: supervised, it would teach the judge to write
none.
"""

import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, Iterator, Mapping, Sequence, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from tract_lite.loss.cot_raft import IGNORE_INDEX
from tract_lite.prompt import Endings, prompt_ids, reasoning_text, scale_of
from tract_lite.record import Record
from tract_lite.scale import ScoreScale, ScoreTokens
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import Vocabulary

Item = TypeVar("Item")

# So many reasons are named where nothing can be trained on.
MOST_REASONS = 3


@dataclass(frozen=True)
class Example:
    """One training sequence: everything from `prompt_length` on is supervised.

    Of a direct one, the marker counts as a part of the prompt. The label `tokens.labels[label]`
    begins at `score_position`; `shares`, which sum to 1: what each label (by its index) has of the
    gold score.
    """

    ids: list[int]
    prompt_length: int
    score_position: int
    target: float
    tokens: ScoreTokens
    label: int
    shares: Mapping[int, float]
    is_direct: bool = False


class Unusable(ValueError):
    """Why a record can't be trained on."""


def encode_record(
    record: Record,
    spec: JudgeSpec,
    vocabulary: Vocabulary,
    *,
    endings: Endings | None = None,
    direct: bool = False,
    soft: bool = False,
) -> Example:
    """The training sequence of a record with a gold score and a reasoning, which a `direct` one
    leaves out.

    A score between two labels keeps its value as the target; its label is the nearest one. Where
    it is `soft`, both have a share of it, and of several annotators' scores each.
    Raises Unusable: no score on the scale, no reasoning or one with the marker inside, nothing to
        make a prompt of, or too many tokens.
    """
    if record.score is None:
        raise Unusable("no gold score")
    try:
        scale, tokens = scale_of(record, spec), (endings or Endings(spec, vocabulary)).of(record)
    except ValueError as error:
        raise Unusable(str(error)) from error
    golds = (record.score, *(record.gold_scores if soft else ()))
    if not all(map(scale.contains, golds)):
        raise Unusable("the gold score is outside the scale")
    reasoning = [] if direct else _reasoning(record, spec, vocabulary)
    try:
        prompt = prompt_ids(record, spec, vocabulary)
    except ValueError as error:
        raise Unusable(str(error)) from error
    label = scale.nearest(record.score)
    ids = [*prompt, *reasoning, *tokens.marker, *tokens.labels[label], spec.eos_id]
    # Other branches of the labels' tree may be longer than the gold label.
    if len(ids) - len(tokens.labels[label]) + tokens.longest > spec.max_length:
        raise Unusable(f"longer than {spec.max_length} tokens (--max-length)")
    given = len(prompt) + len(tokens.marker) * direct
    shares = _shares(scale, golds[1:] or golds) if soft else {label: 1.0}
    position = len(ids) - 1 - len(tokens.labels[label])
    return Example(ids, given, position, record.score, tokens, label, shares, direct)


def _shares(scale: ScoreScale, golds: Sequence[float]) -> dict[int, float]:
    """Each label's share of the gold scores, the mean over these."""
    found: Counter[int] = Counter()
    for gold in golds:
        found.update(scale.shares(gold))
    return {label: share / len(golds) for label, share in found.items()}


def _reasoning(record: Record, spec: JudgeSpec, vocabulary: Vocabulary) -> list[int]:
    given = record.feedback_ids
    reasoning = vocabulary.encode(reasoning_text(record.feedback or "")) if given is None else list(given)
    if not reasoning:
        raise Unusable("no reasoning")
    if spec.marker in vocabulary.decode(reasoning):
        raise Unusable("the marker stands inside the reasoning")
    return reasoning


def encode_records(
    records: Sequence[Record],
    spec: JudgeSpec,
    vocabulary: Vocabulary,
    *,
    direct_share: float = 0.0,
    soft: bool = False,
    seed: int = 0,
    required: bool = False,
) -> tuple[list[Example], Counter[str]]:
    """The examples of all usable records, and how many records were dropped for each reason.

    `direct_share` of the examples are direct. Up to a half they are added to the reasoned ones,
    beyond it reasoned ones are left out; of which records, hangs on the `seed`. At a share of 1 no
    record needs a reasoning. `soft`: see `encode_record`.
    Raises ValueError: no record can be trained on, and one is `required`.
    """
    endings = Endings(spec, vocabulary)
    encode = partial(encode_record, spec=spec, vocabulary=vocabulary, endings=endings, soft=soft)
    usable: list[Record] = []
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    for record in records:
        try:
            examples.append(encode(record, direct=direct_share == 1))
            usable.append(record)
        except Unusable as reason:
            dropped[str(reason)] += 1
    if 0 < direct_share < 1:
        ratio = direct_share / (1 - direct_share)
        chosen = _chosen(usable, ratio, seed)
        examples = _chosen(examples, 1 / ratio, seed)
        examples += [encode(record, direct=True) for record in chosen]
    if required and not examples:
        # A reason may have a second line, which says the next step.
        common = [(*reason.partition("\n"), count) for reason, count in dropped.most_common(MOST_REASONS)]
        reasons = "; ".join(f"{reason}: {count}" for reason, *_, count in common)
        steps = "".join(f"\n{step}" for _, _, step, _ in common[:1] if step)
        raise ValueError(f"no record can be trained on, out of {len(records)}: {reasons or 'there is none'}{steps}")
    return examples, dropped


def _chosen(items: Sequence[Item], ratio: float, seed: int) -> list[Item]:
    """As many of the items as `ratio` of them, one at least and at most all, in their order."""
    count = min(len(items), max(1, round(len(items) * ratio)))
    return [items[place] for place in sorted(random.Random(seed).sample(range(len(items)), count))]


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Any]:
    """A batch with padding on the right, and the `examples` themselves.

    `input_ids`, `attention_mask`, `labels` (B, T); `score_positions`, `score_lengths` (where the
    label begins, and its tokens) and `targets` (B,).
    """
    rows = [torch.tensor(example.ids) for example in examples]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)
    for row, example in zip(labels, examples):
        row[: example.prompt_length] = IGNORE_INDEX
    positions = torch.tensor([example.score_position for example in examples])
    targets = torch.tensor([example.target for example in examples])
    lengths = torch.tensor([len(example.tokens.labels[example.label]) for example in examples])
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "examples": list(examples)}
    return batch | {"score_positions": positions, "score_lengths": lengths, "targets": targets}


class LengthGroupedSampler(Sampler):
    """Batches of similar lengths in an order that depends on the seed and the epoch alone.

    The one with the longest sequence comes first: where memory is too small for it, that shows at
    once. `batch_size` is that of a step, so how many are computed at once changes no order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self._lengths, self._batch_size, self._seed, self._epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator, size = torch.Generator().manual_seed(self._seed + self._epoch), self._batch_size
        order = get_length_grouped_indices(self._lengths, size, generator=generator)
        first, rest = order[:size], order[size:]
        # The indices of hundreds of steps come from long to short; a last batch that is not full
        # stays the last one.
        full = len(rest) // size
        starts = [size * number for number in torch.randperm(full, generator=generator)] + [size * full]
        return iter(first + [index for start in starts for index in rest[start : start + size]])
