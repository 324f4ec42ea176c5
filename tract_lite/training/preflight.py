"""Checks before the first step, on a real batch: what is trained is what the method says.

A framework may give other tensors than asked for, or train nothing, and the loss still looks fine.
"""

import logging
from typing import Sequence

import torch
from torch.nn.functional import cross_entropy

from tract_lite.loss import IGNORE_INDEX
from tract_lite.spec import JudgeSpec
from tract_lite.training.encode import Example, collate
from tract_lite.training.seed_model import compute_dtype, full_logits, hidden_states
from tract_lite.training.trainer import CotRaftTrainer
from tract_lite.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

SEQUENCES = 2
# How far the loss may be from the plain one, relative to it: 16-bit logits are rounded.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# And an expected score from that of the plain logits, as a share of the scale: of single positions
# bfloat16's rounding was seen to move it by 0.024.
SCORE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
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
    model = trainer.model.train()
    batch = {name: tensor.to(trainer.args.device) for name, tensor in collate(shortest, pad_id).items()}
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
    """The score token of each sequence spells the label that is nearest to its gold score."""
    for example in examples:
        label = spec.scale.labels[spec.scale.nearest(example.target)]
        spelled = vocabulary.decode([example.ids[example.score_position]])
        if spelled.strip() != label.strip():
            fault = f"a score token spells {spelled!r}, its gold label is {label!r}"
            advice = "the spec belongs to another vocabulary: make it with this tokenizer, by make_spec"
            raise RuntimeError(f"preflight: {fault}\n{advice}")


def check_loss(trainer: CotRaftTrainer, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """The loss of the batch and that of the plain formula on full logits, which must agree.

    The squared error is compared as what it is made of, the expected scores: far from the gold
    score, it would multiply what rounding makes of them.
    """
    with torch.no_grad():
        # The same random numbers for dropout in both passes.
        torch.manual_seed(0)
        ours = trainer.loss_of(trainer.model, batch)
        torch.manual_seed(0)
        ce, expected = plain_terms(trainer, batch)
    same_scores, plain = (
        (ce + trainer.settings.raft_weight * (scores - batch["targets"]).square().mean()).item()
        for scores in (ours.predictions, expected)
    )
    loss, dtype = ours.loss.item(), compute_dtype(trainer.model)
    width = trainer.score_values.max() - trainer.score_values.min()
    are_near = (ours.predictions - expected).abs().max() <= SCORE_TOLERANCE[dtype] * width
    if not (are_near and abs(loss - same_scores) <= TOLERANCE[dtype] * max(1.0, abs(same_scores))):
        raise RuntimeError(f"preflight: the loss is {loss:.5g}, by the plain formula {plain:.5g}\n{ADVICE}")
    return loss, plain


def plain_terms(trainer: CotRaftTrainer, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy (torch's) and expected scores (B,), from the model's own logits."""
    logits = full_logits(trainer.model, batch["input_ids"], batch["attention_mask"])
    labels, positions = batch["labels"].clone(), batch["score_positions"]
    rows = torch.arange(len(labels), device=labels.device)
    at_score = logits[rows, positions - 1].float()
    expected = at_score.softmax(-1)[:, trainer.score_ids] @ trainer.score_values
    if not trainer.settings.ce_on_score:
        labels[rows, positions] = IGNORE_INDEX
    supervised = labels[:, 1:] != IGNORE_INDEX
    return cross_entropy(logits[:, :-1][supervised].float(), labels[:, 1:][supervised]), expected


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
