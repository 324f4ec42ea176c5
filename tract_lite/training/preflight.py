"""Checks before the first step, on a real batch: what is trained is what the method says.

A framework may give other tensors than asked for, or train nothing, and the loss still looks fine.
"""

import logging
from dataclasses import replace
from typing import Any, Sequence

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.nn.functional import cross_entropy

from tract_lite.loss.cot_raft import IGNORE_INDEX
from tract_lite.loss.label_trees import token_log_probabilities
from tract_lite.rail import LabelReading, expected_score, label_log_probabilities
from tract_lite.spec import JudgeSpec
from tract_lite.training.branches import Node, raft_factor
from tract_lite.training.encode import Example, collate
from tract_lite.training.layers import full_logits
from tract_lite.training.seed_model import compute_dtype, hidden_states
from tract_lite.training.trainer import CotRaftTrainer
from tract_lite.vocabulary import Vocabulary, clean_text

logger = logging.getLogger(__name__)

SEQUENCES = 2
# How far the loss may be from the plain one, relative to it: 16-bit logits are rounded.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# And an expected score from that of the plain logits, as a share of the scale: of single positions
# bfloat16's rounding was seen to move it by 0.024.
SCORE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
# And log-probabilities of single tokens, which single precision moves by less than 0.001.
NODE_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.1}
# Keeps small gradients above the least float16, as the scaler does in training.
LOSS_FACTOR = 1024.0
ADVICE = "take another training backend (load_seed(..., backend='transformers')), or another seed model"


def preflight(
    trainer: CotRaftTrainer, examples: Sequence[Example], spec: JudgeSpec, vocabulary: Vocabulary, pad_id: int
) -> None:
    """Check loss, gradients and labels on the shortest sequences; changes no weight.
    Raises RuntimeError: the first fault found, in words.
    """
    shortest = sorted(examples, key=lambda example: len(example.ids))[:SEQUENCES]
    check_labels(shortest, spec, vocabulary)
    # What a share of a label does is arithmetic; what is checked is where its numbers come from.
    shortest = [replace(example, shares={example.label: 1.0}) for example in shortest]
    model = trainer.model.train()
    batch = send_to_device(collate(shortest, pad_id), trainer.args.device)
    on_gpus = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(on_gpus), trainer.compute_loss_context_manager():
        width = model.config.get_text_config().hidden_size
        with torch.no_grad():
            found = hidden_states(model, batch["input_ids"], batch["attention_mask"]).shape[-1]
        # A backend may give logits in their place.
        if found != width:
            fault = f"the hidden states are {found} wide, the model's are {width}"
            raise RuntimeError(f"preflight: {fault}\n{ADVICE}")
        loss, plain = check_loss(trainer, batch)
        count = check_gradients(trainer, batch)
    message = "preflight: loss %.4f, by the plain formula %.4f; all %d LoRA B matrices get a gradient"
    logger.info(message, loss, plain, count)


def check_labels(examples: Sequence[Example], spec: JudgeSpec, vocabulary: Vocabulary) -> None:
    """The score tokens of each sequence spell the label that is nearest to its gold score."""
    for example in examples:
        # Other scales than the spec's are encoded with this vocabulary, just before.
        if example.tokens != spec.tokens:
            continue
        label = spec.scale.labels[spec.scale.nearest(example.target)]
        start = example.score_position
        spelled = vocabulary.decode(example.ids[start : start + len(example.tokens.labels[example.label])])
        if spelled.strip() != clean_text(label):
            fault = f"a score token spells {spelled!r}, its gold label is {label!r}"
            advice = "the spec belongs to another vocabulary: make it with this tokenizer, by make_spec"
            raise RuntimeError(f"preflight: {fault}\n{advice}")


def check_loss(trainer: CotRaftTrainer, batch: dict[str, Any]) -> tuple[float, float]:
    """The loss of the batch and that of the plain formula on full logits, which must agree.

    The squared error is compared as what it is made of, the expected scores: far from the gold
    score, it would multiply what rounding makes of them.
    """
    with torch.no_grad():
        # The same random numbers for dropout in both passes; those of branches have none.
        torch.manual_seed(0)
        trainer.model.train(trainer.is_flat)
        ours = trainer.loss_of(trainer.model, batch)
        ce, expected = plain_terms(trainer, batch)
        trainer.model.train()
    widths = expected.new_tensor([one.tokens.width for one in batch["examples"]])
    same_scores, plain = (
        (ce + trainer.settings.raft_weight * (raft_factor(widths) * (scores - batch["targets"]).square()).mean()).item()
        for scores in (ours.predictions, expected)
    )
    loss, dtype = ours.loss.item(), compute_dtype(trainer.model)
    are_near = bool(((ours.predictions - expected).abs() <= SCORE_TOLERANCE[dtype] * widths).all())
    if not (are_near and abs(loss - same_scores) <= TOLERANCE[dtype] * max(1.0, abs(same_scores))):
        raise RuntimeError(f"preflight: the loss is {loss:.5g}, by the plain formula {plain:.5g}\n{ADVICE}")
    return loss, plain


def plain_terms(trainer: CotRaftTrainer, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy (torch's) and expected scores (B,), from the model's own logits.
    Raises RuntimeError: at some node of the labels' trees the loss reads other logits.
    """
    labels = batch["labels"].clone()
    torch.manual_seed(0)
    logits = full_logits(trainer.model, batch["input_ids"], batch["attention_mask"])
    nodes = plain_nodes(trainer.model, batch["examples"], logits)
    if not trainer.is_flat:
        check_nodes(trainer, batch, nodes)
    expected = []
    for row, example in enumerate(batch["examples"]):
        reading = LabelReading(example.tokens, trainer.end_id)
        while reading.wanted:
            reading.add_logits(reading.wanted[-1], nodes[row, reading.wanted[-1]])
        expected.append(expected_score(np.exp(reading.log_probabilities), example.tokens.values))
        if not trainer.settings.ce_on_score:
            start = example.score_position
            labels[row, start : start + len(example.tokens.labels[example.label])] = IGNORE_INDEX
    supervised = labels[:, 1:] != IGNORE_INDEX
    ce = cross_entropy(logits[:, :-1][supervised].float(), labels[:, 1:][supervised])
    return ce, torch.tensor(expected, dtype=ce.dtype, device=ce.device)


def plain_nodes(model: Any, examples: Sequence[Example], logits: torch.Tensor) -> dict[Node, np.ndarray]:
    """The logits (V,) at each node of the labels' trees, by sequences of their own.

    `logits` (B, T, V): those of the examples.
    """
    found = {}
    for row, example in enumerate(examples):
        for node in example.tokens.following:
            after = logits[row, example.score_position - 1]
            if node:
                ids = torch.tensor([[*example.ids[: example.score_position], *node]], device=logits.device)
                after = full_logits(model, ids, torch.ones_like(ids))[0, -1]
            found[row, node] = after.float().cpu().numpy()
    return found


def check_nodes(trainer: CotRaftTrainer, batch: dict[str, Any], nodes: dict[Node, np.ndarray]) -> None:
    """What the loss reads at each node are the log-probabilities of the model's own logits."""
    trees, _, states = trainer.read_trees(trainer.model, batch["examples"], batch["input_ids"])
    read = token_log_probabilities(states, trainer.head, trees.tokens, **trainer.head_options).cpu().numpy()
    tolerance = NODE_TOLERANCE[compute_dtype(trainer.model)]
    for (row, node), found in zip(nodes, read):
        following = batch["examples"][row].tokens.following[node]
        plain = label_log_probabilities(nodes[row, node], following)
        if (worst := np.abs(found[: len(following)] - plain).max()) > tolerance:
            fault = f"after {len(node)} tokens of a label, a log-probability is off by {worst:.3g}"
            raise RuntimeError(f"preflight: {fault} by the plain formula\n{ADVICE}")


def check_gradients(trainer: CotRaftTrainer, batch: dict[str, torch.Tensor]) -> int:
    """Every LoRA B matrix gets a finite, non-zero gradient; returns how many there are.

    The A matrices of a new adapter get none, since B is zero.
    """
    model = trainer.model
    matrices = {name: weight for name, weight in model.named_parameters() if "lora_B" in name and weight.requires_grad}
    if not matrices:
        raise RuntimeError("preflight: the model has no LoRA adapter to train: call add_lora first")
    (trainer.loss_of(model, batch).loss * LOSS_FACTOR).backward()
    gradients = {name: matrix.grad for name, matrix in matrices.items()}
    faulty = [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all() or not grad.any()]
    model.zero_grad()
    if faulty:
        fault = f"{len(faulty)} of {len(matrices)} LoRA B matrices get no usable gradient, such as {faulty[0]}"
        raise RuntimeError(f"preflight: {fault}\n{ADVICE}")
    return len(matrices)
