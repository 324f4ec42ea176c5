"""A toy seed model for machines without a GPU: a small Llama with a sentencepiece vocabulary,
trained from scratch on the text of the records it is to judge."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
from pathlib import Path
from typing import Any, Iterator, Sequence

import sentencepiece
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tract_lite import JudgeSpec, Record
from tract_lite.encode import Example, collate, encode_records
from tract_lite.loss import cot_raft_loss
from tract_lite.cache import cache_folder
from tract_lite.prompt import make_spec, render
from tract_lite.records import record_to_row
from tract_lite.vocabulary import TransformersVocabulary

logger = logging.getLogger(__name__)

WIDTH, LAYERS, HEADS = 128, 3, 4
BATCH_SIZE = 32
BATCH_TOKENS = 4096
LEARNING_RATE = 3e-3
WARMUP_STEPS = 30
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def cached_seed(records: Sequence[Record], spec_fields: dict[str, Any], *, vocabulary_size: int,
                steps: int) -> Path:
    """The folder of a seed that has learnt to answer `records`; trained at first use."""
    content = [Path(__file__).read_text(encoding="utf-8"), vocabulary_size, steps,
               [record_to_row(record) for record in records]]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    folder = cache_folder() / f"toy_seed-{digest}"
    if folder.exists():
        logger.info("the toy seed is at %s", folder)
        return folder
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    unfinished.mkdir(parents=True)
    _train_vocabulary(unfinished, records, spec_fields, vocabulary_size)
    tokenizer = AutoTokenizer.from_pretrained(unfinished)
    model = _train_model(records, make_spec(tokenizer, **spec_fields), tokenizer, steps)
    # Real seeds come in 16 bits; so does this one.
    model.to(torch.bfloat16).save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def _train_vocabulary(folder: Path, records: Sequence[Record], spec_fields: dict[str, Any],
                      size: int) -> None:
    text = "\n".join(_texts(records, spec_fields))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")), model_prefix=str(folder / "tokenizer"),
        vocab_size=size, model_type="bpe", byte_fallback=True, split_digits=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, max_sentence_length=100_000, minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(
        SPECIALS | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}))


def _texts(records: Sequence[Record], spec_fields: dict[str, Any]) -> Iterator[str]:
    scale = spec_fields["scale"]
    fields = {name: () for name in ("chat", "marker_ids", "label_ids", "pieces")}
    spec = JudgeSpec(eos_id=0, **fields, **spec_fields)
    for number, record in enumerate(records):
        label = scale.labels[number % len(scale.labels)]
        yield f"{render(record, spec)}{record.feedback} {spec.marker} {label}"


def _train_model(records: Sequence[Record], spec: JudgeSpec, tokenizer: Any,
                 steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=8192, initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    ))
    examples, _ = encode_records(records, spec, TransformersVocabulary(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        1.0, step / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps)))
    ids = torch.tensor(spec.label_ids)
    values = torch.tensor(spec.scale.values)
    for _, batch in zip(tqdm(range(steps), "toy seed"), _batches(examples)):
        inputs = collate(batch, pad_id=0)
        # Right padding is behind all real tokens, so the causal mask is enough.
        hidden = model.model(inputs["input_ids"]).last_hidden_state
        loss = cot_raft_loss(hidden, model.lm_head.weight, inputs["labels"],
                             inputs["score_positions"], ids, values, inputs["targets"],
                             raft_weight=0.0).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Endless batches of similar lengths, of at most `BATCH_TOKENS` tokens or one example."""
    draw = random.Random(0)
    by_length = sorted(examples, key=lambda example: len(example.ids))
    while True:
        start = draw.randrange(len(by_length))
        longest = len(by_length[min(start + BATCH_SIZE, len(by_length)) - 1].ids)
        count = max(1, min(BATCH_SIZE, BATCH_TOKENS // longest))
        yield by_length[start : start + count]
