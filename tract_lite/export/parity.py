"""Does one judge read the same ids and give the same scores as another?"""

import logging
import math
import sys
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import chain
from os.path import commonprefix
from pathlib import Path
from statistics import fmean
from typing import Any, Mapping, Sequence

import psutil
import torch

from tract_lite.engines.llama_cpp import check_generates, load_model, quiet_llama
from tract_lite.export.model_folder import GB
from tract_lite.judge import Judge
from tract_lite.judgement import Judgement
from tract_lite.prompt import prompt_ids, reasoning_text
from tract_lite.record import Record, Rubric
from tract_lite.spec import JudgeSpec, chat_pieces
from tract_lite.training.quiet import progress, quieter
from tract_lite.vocabulary import GGUFVocabulary, TransformersVocabulary, Vocabulary

# Mean difference in score on a scale of 1 to 5, and mean distance of distributions, that an exact
# type or Q8_0 may cost. What a smaller type costs is for its user to judge.
BOUNDS, BOUNDS_RANGE = {"f32": 0.01, "f16": 0.01, "bf16": 0.05, "q8_0": 0.05}, 4
# What one record as long as any may cost in distance: this, or so many times the others' mean.
LONG_BOUND, LONG_FACTOR = 0.1, 4
# Seed models whose sliding window llama.cpp leaves out: it reads everything that came before.
WINDOW_LEFT_OUT = "mistral mixtral phi3 qwen2 qwen2_moe qwen3 qwen3_moe starcoder2".split()
WINDOWED = ("sliding_attention",)
_REASONING = "The answer is short and clear, but it gives no reason."
_SENTENCES = ("Step {0} takes {1} of the {0} parts.", "Why {1}?", "It was {0}, then {1}; nobody said so before.")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parity:
    """How far two judges lie apart after the same reasoning ids.

    `different_prompts` have other ids in the two vocabularies. Differences are those of the scores,
    `mean_distance` is the distributions' (total variation, 0 to 1), each normalised to the labels.
    The `long_` ones are of a record of its own with `long_tokens`, 0 where none was compared.
    """

    records: int
    different_prompts: int
    mean_difference: float
    largest_difference: float
    mean_distance: float
    long_tokens: int = 0
    long_difference: float = 0.0
    long_distance: float = 0.0

    def __str__(self) -> str:
        prompts = f"{self.records} records: {self.different_prompts} prompts with other ids"
        scores = f"scores differ by {self.mean_difference:.4f} on average, {self.largest_difference:.4f} at most"
        long = f"; with {self.long_tokens} tokens by {self.long_difference:.4f} and {self.long_distance:.4f}"
        return f"{prompts}, {scores}, distributions by {self.mean_distance:.4f}{long if self.long_tokens else ''}"


def compare(judge: Judge, other: Judge, records: Sequence[Record], judgements: Sequence[Judgement]) -> Parity:
    """Let `other` read the reasonings that `judge` gave in `judgements`, or judge without one where
    there are none, and compare the scores.
    Raises ValueError: no record was judged by both.
    """
    judged = [(record, given) for record, given in zip(records, judgements) if not given.error]
    asked = [record for record, _ in judged]
    reasonings = [given.feedback_ids for _, given in judged]
    reread = other.score_many(asked, reasonings=reasonings) if any(reasonings) else other.score_many(asked, 0)
    both = [(again, given) for again, (_, given) in zip(reread, judged) if not again.error]
    if not both:
        raise ValueError("no record was judged by both judges")
    prompts = [[prompt_ids(record, j.spec, j.engine.vocabulary) for record in asked] for j in (judge, other)]
    different_prompts = sum(ids != other_ids for ids, other_ids in zip(*prompts))
    differences = [abs(again.score - given.score) for again, given in both]
    distance = fmean(_distance(again, given) for again, given in both)
    return Parity(len(both), different_prompts, fmean(differences), max(differences), distance)


def _distance(one: Judgement, other: Judgement) -> float:
    """Total variation distance between the distributions, normalised to the labels."""
    mass, other_mass = one.mass or math.nan, other.mass or math.nan
    shares = [(share / mass, other.probabilities[label] / other_mass) for label, share in one.probabilities.items()]
    return sum(abs(share - other_share) for share, other_share in shares) / 2


def hard_records(spec: JudgeSpec, specials: Sequence[str] = ()) -> list[Record]:
    """Records, also of `specials` as text, which vocabularies are likely to read differently."""
    rubric = Rubric("Is the answer right?", {label: f"{label} of all the best" for label in spec.scale.labels})
    texts = (
        "Yes: 2 + 2 = 4, 10/5 = 2.0 and 1,234,567.89.",
        "  two spaces,\ttab\n\n\nlines\r\n end with one ",
        "naïve café, e\u0301, 東京, Привет, 🙂👍🏽, zero\u200bwidth, no\u00a0break, \u2581",
        f"{' '.join(specials)}<s> </s><|endoftext|><|eot_id|><|im_end|>[INST]",
        f"{spec.marker} {spec.scale.labels[-1]}\n\n{spec.marker} ",
    )
    item = Record(instruction="Answer the question.", rubric=rubric, reference="It is 4.")
    return [replace(item, response=text, id=f"check {number}") for number, text in enumerate(texts, 1)]


def long_record(spec: JudgeSpec, vocabulary: Vocabulary, reasoning: Sequence[int], length: int) -> Record:
    """A ready prompt that makes, with a reasoning and the score, nearly `length` tokens."""
    sentences = [_SENTENCES[n % len(_SENTENCES)].format(n, n * n % 97) for n in range(length)]
    # As `room_for` counts them.
    room = length - len(reasoning) - len(spec.marker_ids) - spec.tokens.longest - 1

    def first(count: int) -> Record:
        return Record(prompt=" ".join(sentences[:count]), id="long check")

    fitting = bisect_right(range(length), room, key=lambda count: len(prompt_ids(first(count), spec, vocabulary)))
    return first(fitting - 1)


def reading_limit(config: Any) -> int | None:
    """Up to how many tokens llama.cpp computes as transformers does; None: at all lengths.

    `config` is that of a transformers model. Beyond a sliding window llama.cpp reads more than the
    model did in training, and it takes the factors of a long rope by the length of its context.
    """
    text = config.get_text_config()
    limits = []
    if text.model_type in WINDOW_LEFT_OUT and "sliding_attention" in (getattr(text, "layer_types", None) or WINDOWED):
        limits.append(text.sliding_window)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        limits.append(rope.get("original_max_position_embeddings"))
    return min(filter(None, limits), default=None)


def check_ids(spec: JudgeSpec, tokenizer: Any, vocabulary: Vocabulary, records: Sequence[Record]) -> None:
    """Make sure that a tokenizer and llama.cpp's `vocabulary` read a judge's ids alike.

    Compared are the ids of the records' prompts and the spellings of marker, labels and special
    tokens. The spec must also have the special tokens of the tokenizer's own chat format.
    Raises RuntimeError: they differ; says where.
    """
    advice = "its GGUF file would be another judge: choose another seed model"
    theirs = TransformersVocabulary(tokenizer)
    chat = [piece for piece in spec.chat if isinstance(piece, int)]
    own = [piece for piece in chat_pieces(tokenizer, theirs) if isinstance(piece, int)]
    if chat != own:
        both = f"{theirs.pieces(chat)}, and the tokenizer's own chat format has {theirs.pieces(own)}"
        raise RuntimeError(f"the judge's prompt has the special tokens {both}\ngive the spec of this model's own judge")
    ids = [*chat, spec.eos_id, *spec.marker_ids, *chain(*spec.label_ids)]
    # llama.cpp ends the process where an id lies beyond its vocabulary.
    pieces, found = theirs.pieces(ids), vocabulary.pieces([i for i in ids if i < len(vocabulary)])
    if pieces != found:
        raise RuntimeError(f"the ids {ids} are {pieces} in transformers and {found} in llama.cpp\n{advice}")
    for record in records:
        expected, got = prompt_ids(record, spec, theirs), prompt_ids(record, spec, vocabulary)
        if got != expected:
            at = len(commonprefix([expected, got]))
            first, ours = theirs.pieces(expected[at : at + 5]), vocabulary.pieces(got[at : at + 5])
            place = f"the prompt of record {record.id} has other tokens from position {at} on"
            raise RuntimeError(f"{place}: {first} in transformers, {ours} in llama.cpp\n{advice}")


def check_vocabulary(spec: JudgeSpec, tokenizer: Any, file: Path, records: Sequence[Record] = ()) -> list[Record]:
    """`check_ids` with a GGUF file, on `hard_records` unless given; returns those it took.
    Raises RuntimeError: ids differ. Raises ValueError: the engine can't run such a model.
    """
    if not records:
        records = hard_records(spec, list(TransformersVocabulary(tokenizer).specials)[:20])
    model = load_model(file, vocab_only=True)
    try:
        check_generates(model)
        check_ids(spec, tokenizer, GGUFVocabulary(model), records)
    finally:
        quiet_llama().llama_model_free(model)
    _show(f"parity: {file.stem}: the ids of {len(records)} prompts and of the spec are those of transformers")
    return list(records)


def check_export(
    spec: JudgeSpec,
    tokenizer: Any,
    folder: Path,
    files: Mapping[str, Path],
    weights: int,
    records: Sequence[Record] = (),
) -> dict[str, Parity]:
    """Make sure that GGUF files are the judge in the model folder that they were made from.

    `files`: by type, such as "q8_0"; `weights`: how many the model has. First the ids, see
    `check_ids`. Then the scores after each record's own reasoning or a fixed one, of a direct judge
    without one, against transformers in float32, and those of one made-up record as long as any may
    be; where memory is too small for that, the log says so. A difference above the type's bound is
    a warning. Returns the figures by type.
    """
    taken = [check_vocabulary(spec, tokenizer, file, records) for file in files.values()]
    # Where a model would be loaded: on the GPU, or in main memory.
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    # Beside the weights, with some to spare.
    needed = 4 * weights + GB
    if needed > free:
        there = f"transformers takes {needed / GB:.1f} GB of memory, and {free / GB:.1f} GB are free"
        logger.warning("parity: scores are not compared: %s", there)
        return {}
    from tract_lite.training.seed_model import load_seed

    model, tokenizer = load_seed(folder, load_in_4bit=False, backend="transformers", precision="float32")
    figures, checked = {}, taken[0]
    # What is odd about these judgements says nothing of the judge: some texts are made up.
    bar = progress("checking the export", len(checked) * (1 + len(files)))
    quiet = quieter("judge", logging.ERROR)
    with quiet, bar, Judge.from_model(model, tokenizer, spec, parallel=1) as reference:
        texts = [reasoning_text(record.pairs()[0].feedback or "") or _REASONING for record in checked]
        reasonings = [[reference.engine.vocabulary.encode(text)] for text in texts]
        how: dict[str, Any] = {"n_cot": 0} if reference.is_direct else {"reasonings": reasonings}
        judged = []
        for judgement in reference.score_many(checked, **how):
            judged.append(judgement)
            bar.update()
        if all(judgement.error for judgement in judged):
            logger.warning("parity: scores are not compared: %s", judged[0].error)
            return {}
        long = _judged_long(reference, model.config, free - needed)
        for name, file in files.items():
            with Judge.from_gguf(file, spec, parallel=1) as judge:
                figures[name] = compare(reference, judge, checked, judged)
                bar.update(len(checked))
                for record, judgement, tokens in long:
                    far = compare(reference, judge, [record], [judgement])
                    figures[name] = replace(
                        figures[name],
                        long_tokens=tokens,
                        long_difference=far.mean_difference,
                        long_distance=far.mean_distance,
                    )
            _report(name, figures[name], spec, reading_limit(model.config))
    return figures


def _judged_long(reference: Judge, config: Any, free: int) -> list[tuple[Record, Judgement, int]]:
    """A record as long as any may be, its judgement and its tokens; none if `free` has no room."""
    spec, vocabulary, text = reference.spec, reference.engine.vocabulary, config.get_text_config()
    length = min(spec.max_length, getattr(text, "max_position_embeddings", None) or spec.max_length)
    # Attention in float32 and its softmax, where the kernel keeps them.
    needed = 2 * 4 * text.num_attention_heads * length**2
    if needed > free:
        there = f"that takes {needed / GB:.1f} GB more, and {free / GB:.1f} GB are free"
        _show(f"parity: no record of {length} tokens is compared: {there}")
        return []
    reasoning = [] if reference.is_direct else vocabulary.encode(_REASONING)
    record = long_record(spec, vocabulary, reasoning, length)
    how: dict[str, Any] = {"reasonings": [[reasoning]]} if reasoning else {"n_cot": 0}
    (judgement,) = reference.score_many([record], **how)
    tokens = len(prompt_ids(record, spec, vocabulary)) + len(reasoning) + len(spec.marker_ids) + 1
    return [] if judgement.error else [(record, judgement, tokens)]


def _report(name: str, parity: Parity, spec: JudgeSpec, limit: int | None = None) -> None:
    """Show the figures, and warn of those beyond the bounds; `limit`: see `reading_limit`."""
    _show(f"parity: {name}: {parity}")
    advice, shorter = "compare both on your own records", "judge texts as short as those with this file"
    if limit and limit < spec.max_length:
        advice = shorter = f"judge texts of {limit} tokens at most with this file (context_length={limit})"
    if not parity.long_distance <= max(LONG_BOUND, LONG_FACTOR * parity.mean_distance):
        there, others = f"{parity.long_distance:.4f} at {parity.long_tokens} tokens", f"{parity.mean_distance:.4f}"
        fault = f"llama.cpp reads long records otherwise: distributions differ by {there}, those of others by {others}"
        logger.warning("%s: %s\n%s, or take another seed model", name, fault, shorter)
    bound = BOUNDS.get(name, math.inf)
    wide = bound * spec.scale.width / BOUNDS_RANGE
    for what, got, most in (("scores", parity.mean_difference, wide), ("distributions", parity.mean_distance, bound)):
        if not got <= most:
            far = f"differ by {got:.4f} from those of transformers, more than the {most:.4f} that this type may cost"
            logger.warning("%s: %s %s\n%s", name, what, far, advice)


def _show(text: str) -> None:
    """Figures are printed where no log takes them."""
    logger.info("%s", text)
    if logger.getEffectiveLevel() == logging.WARNING:
        print(text, file=sys.stderr)
