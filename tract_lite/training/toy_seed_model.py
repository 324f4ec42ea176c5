"""A toy seed model for machines without a GPU: a small Llama with a sentencepiece vocabulary,
trained from scratch on the text of the records it is to judge."""

import json
import logging
import math
import os
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Iterator, Sequence

import sentencepiece
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tract_lite.data.files import cache_folder
from tract_lite.data.formats import record_to_row
from tract_lite.data.scales import scale_cell
from tract_lite.loss.cot_raft import cot_raft_loss
from tract_lite.prompt import render
from tract_lite.record import Record, digest
from tract_lite.scale import ScoreScale
from tract_lite.spec import DEFAULT_TEMPLATE, JudgeSpec, make_spec
from tract_lite.training.encode import Example, collate, encode_records
from tract_lite.vocabulary import TransformersVocabulary

logger = logging.getLogger(__name__)

WIDTH, LAYERS, HEADS = 128, 3, 4
BATCH_SIZE = 32
BATCH_TOKENS = 4096
LEARNING_RATE = 3e-3
WARMUP_STEPS = 30
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def make_toy_seed_model(
    records: Sequence[Record], scale: ScoreScale, *, vocabulary_size: int, steps: int, **fields: Any
) -> Path:
    """The folder of a toy seed model that has learnt to answer `records`; trained at first use.

    `vocabulary_size` in tokens; `steps` of training; `fields` are further ones of the spec.
    Raises ValueError: no record can be trained on.
    """
    source = Path(__file__).read_text(encoding="utf-8")
    chosen = {name: fields.get(name) for name in ("template", "marker", "max_length", "any_scale")}
    chosen |= {"scale": scale_cell(scale), "units": (units := fields.get("units")) and scale_cell(units)}
    content = [source, vocabulary_size, steps, list(map(record_to_row, records)), chosen]
    folder = cache_folder() / f"toy_seed_model-{digest(content)}"
    if folder.exists():
        logger.info("the toy seed model is at %s", folder)
        return folder
    with TemporaryDirectory(dir=folder.parent) as temporary:
        unfinished = Path(temporary, "model")
        unfinished.mkdir()
        _train_vocabulary(unfinished, _texts(records, scale, fields), vocabulary_size)
        tokenizer = AutoTokenizer.from_pretrained(unfinished)
        model = _train_model(records, make_spec(tokenizer, scale, **fields), tokenizer, steps)
        # Real seed models come in 16 bits; so does this one.
        model.bfloat16().save_pretrained(unfinished)
        # Of two processes, the first one gives it.
        if not folder.exists():
            os.replace(unfinished, folder)
    return folder


def _train_vocabulary(folder: Path, texts: Iterator[str], size: int) -> None:
    lines, prefix = iter("\n".join(texts).split("\n")), str(folder / "tokenizer")
    kind: dict[str, Any] = {"model_type": "bpe", "byte_fallback": True, "split_digits": True}
    kind |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "character_coverage": 1.0}
    kind |= {"vocab_size": size, "hard_vocab_limit": False, "max_sentence_length": 100_000, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=prefix, **kind)
    (folder / "tokenizer.vocab").unlink()
    config = {**SPECIALS, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _texts(records: Sequence[Record], scale: ScoreScale, fields: dict[str, Any]) -> Iterator[str]:
    """What the vocabulary is made for: prompts, reasonings and scores."""
    ids = {name: () for name in ("chat", "marker_ids", "label_ids", "pieces")}
    spec = JudgeSpec(eos_id=0, scale=scale, **{"template": DEFAULT_TEMPLATE, **ids, **fields})
    for number, record in enumerate(records):
        labels = (record.scale or scale).labels
        label = labels[number % len(labels)]
        yield f"{render(record, spec)}{record.feedback} {spec.marker} {label}"


def _train_model(records: Sequence[Record], spec: JudgeSpec, tokenizer: Any, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "max_position_embeddings": 8192}
    shape |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": len(tokenizer)}
    shape |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.05))
    examples, _ = encode_records(records, spec, TransformersVocabulary(tokenizer), required=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    ids, values = torch.tensor([label[0] for label in spec.label_ids]), torch.tensor(spec.scale.values)
    for _, batch in zip(tqdm(range(steps), "toy seed model"), _batches(examples)):
        inputs = collate(batch, pad_id=0)
        # Right padding is behind all real tokens, so the causal mask is enough.
        hidden = model.model(inputs["input_ids"]).last_hidden_state
        labels, places, targets = (inputs[name] for name in ("labels", "score_positions", "targets"))
        head = model.lm_head.weight
        loss = cot_raft_loss(hidden, head, labels, places, ids, values, targets, raft_weight=0.0).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        cosine.step()
    return model


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Endless batches of similar lengths, of at most `BATCH_TOKENS` tokens or one example."""
    draw = random.Random(0)
    by_length = sorted(examples, key=lambda example: len(example.ids))
    while True:
        start = draw.randrange(len(by_length))
        batch = by_length[start : start + BATCH_SIZE]
        yield batch[: max(1, BATCH_TOKENS // len(batch[-1].ids))]
