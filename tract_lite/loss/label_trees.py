"""CoT-RAFT where labels have several tokens, sequences scales of their own, or targets shares.

The probability of a label is that of its path through the tree of its scale's labels, as in `rail`.
Shapes: B sequences, T positions, H hidden size, V vocabulary, M nodes of all trees, C tokens of a
node at most, L labels of all sequences, D tokens of a label at most.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch

from tract_lite.loss.cot_raft import IGNORE_INDEX, CotRaftLoss, at_least_one, cot_raft_loss
from tract_lite.loss.projection import capped_logits, chunk_rows, project_back, slope, times_slopes


@dataclass(frozen=True)
class LabelTrees:
    """The labels' trees of a batch, as indices.

    `tokens` (M, C): what is read after each node, and `leads` (M, C): which of these lead on. The
    places in `tokens`, flattened, count up to M * C, which stands for no token at all: `paths`
    (L, D) of each label's tokens, `ends` (L,) of the end token behind a label that begins others.
    `stops` (L,): the node of such a label, M for others. `rows`, `values`, `shares` (L,): each
    label's sequence, its value, and its share of that sequence's target. `weights` (B,): of each
    sequence's squared error.
    """

    tokens: torch.Tensor
    leads: torch.Tensor
    paths: torch.Tensor
    ends: torch.Tensor
    stops: torch.Tensor
    rows: torch.Tensor
    values: torch.Tensor
    shares: torch.Tensor
    weights: torch.Tensor

    def to(self, device: Any) -> "LabelTrees":
        """On another device."""
        return LabelTrees(*(getattr(self, item.name).to(device) for item in fields(self)))


def expected_scores(log_probabilities: torch.Tensor, trees: LabelTrees) -> torch.Tensor:
    """The RAIL expectation (B,) of each sequence, of the log-probabilities (M, C) at its nodes."""
    paths = _at(log_probabilities, trees.paths).sum(1).exp()
    leads_on = log_probabilities.exp().where(trees.leads, 0).sum(1)
    stops = 1 - torch.cat([leads_on, leads_on.new_zeros(1)])
    probabilities = paths * stops[trees.stops]
    values = trees.values.to(probabilities.dtype)
    return probabilities.new_zeros(len(trees.weights)).index_add(0, trees.rows, probabilities * values)


def _at(log_probabilities: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What stands at places of the flattened log-probabilities, 0 at the one behind the last."""
    return torch.cat([log_probabilities.flatten(), log_probabilities.new_zeros(1)])[places]


def cot_raft_tree_loss(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    score_spans: torch.Tensor,
    node_states: torch.Tensor,
    trees: LabelTrees,
    targets: torch.Tensor,
    *,
    raft_weight: float = 1.0,
    ce_on_score: bool = True,
    num_tokens: torch.Tensor | int | None = None,
    num_sequences: torch.Tensor | int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    head_bias: torch.Tensor | None = None,
) -> CotRaftLoss:
    """As `cot_raft_loss`, with the labels' probabilities read at the nodes of their trees.

    The cross-entropy of a label is that of its tokens and, where it begins others, of the end token
    after it; with shares, the mean over the labels by these. What a sequence has behind its label
    counts as ever.

    Args:
        hidden_states, lm_head_weight, labels, targets: as for `cot_raft_loss`.
        score_spans: (B, 2) where the tokens of each sequence's label begin, and how many there are.
        node_states: (M, H) hidden states after the nodes.
        trees: the trees of the sequences.
        raft_weight, ce_on_score, num_tokens, num_sequences, softcap, logit_scale, head_bias: as for
            `cot_raft_loss`.
    """
    begins, sizes = score_spans[:, :1], score_spans[:, 1:]
    positions = torch.arange(labels.shape[1], device=labels.device)
    is_label = (positions >= begins) & (positions < begins + sizes)
    is_soft = (
        trees.shares.new_zeros(len(labels)).index_add(0, trees.rows, (trees.shares > 0).to(trees.shares.dtype)) > 1
    )
    count = ((labels != IGNORE_INDEX) & (ce_on_score | ~is_label)).sum() if num_tokens is None else num_tokens
    left_out = is_label if not ce_on_score else is_label & is_soft[:, None]
    plain = labels.masked_fill(left_out, IGNORE_INDEX)
    options: dict[str, Any] = {"softcap": softcap, "logit_scale": logit_scale, "head_bias": head_bias}
    nowhere = torch.full_like(begins[:, 0], -1)
    nothing = torch.zeros(1, dtype=torch.long, device=labels.device)
    text = cot_raft_loss(
        hidden_states, lm_head_weight, plain, nowhere, nothing, nothing, targets, num_tokens=count, **options
    )
    read = token_log_probabilities(node_states, lm_head_weight, trees.tokens, **options)
    predictions = expected_scores(read, trees)
    total = at_least_one(len(labels) if num_sequences is None else num_sequences, labels).to(read.dtype)
    raft = (trees.weights.to(read.dtype) * (predictions - targets.to(read.dtype)).square()).sum() / total
    ce = text.ce
    loss = text.loss + raft_weight * raft
    if ce_on_score and bool(is_soft.any()):
        logs = _at(read, trees.paths).sum(1) + _at(read, trees.ends)
        soft = -(trees.shares.to(read.dtype) * is_soft[trees.rows] * logs).sum()
        soft = soft / at_least_one(count, labels).to(read.dtype)
        ce, loss = ce + soft.detach(), loss + soft
    return CotRaftLoss(loss, ce, raft.detach(), predictions.detach())


def token_log_probabilities(
    states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    tokens: torch.Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    head_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probabilities (M, C) of `tokens` (M, C) after each of the hidden states (M, H).

    Of the logits no more than a chunk is alive, in the backward pass as well. The other arguments
    are those of `cot_raft_loss`.
    """
    return _TokenLogProbabilities.apply(states, lm_head_weight, head_bias, tokens, softcap, float(logit_scale))


class _TokenLogProbabilities(torch.autograd.Function):
    """Projects again in the backward pass, which alone knows the gradients."""

    @staticmethod
    def forward(ctx, states, weight, bias, tokens, cap, scale):
        dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
        read = states.new_empty(tokens.shape, dtype=dtype)
        with torch.autocast(states.device.type, enabled=False):
            for chunk in _chunks(states, weight):
                logits = capped_logits(states[chunk].to(dtype) * scale, weight, bias, cap, scale)
                read[chunk] = logits.gather(1, tokens[chunk]) - logits.logsumexp(1, keepdim=True)
                del logits
        ctx.save_for_backward(states, weight, bias, tokens)
        ctx.options = cap, scale, dtype
        return read

    @staticmethod
    def backward(ctx, grad_read):
        states, weight, bias, tokens = ctx.saved_tensors
        cap, scale, dtype = ctx.options
        needs = ctx.needs_input_grad
        grads = [
            torch.zeros_like(one, dtype=dtype) if need else None for one, need in zip((states, weight, bias), needs)
        ]
        grad_states, grad_weight, grad_bias = grads
        with torch.autocast(states.device.type, enabled=False):
            for chunk in _chunks(states, weight):
                h, ids, pull = states[chunk].to(dtype) * scale, tokens[chunk], grad_read[chunk].to(dtype)
                logits = capped_logits(h, weight, bias, cap, scale)
                at_tokens, log_total = logits.gather(1, ids), logits.logsumexp(1)
                grad = logits.sub_(log_total[:, None]).exp_()
                if cap:
                    times_slopes(grad, log_total, cap)
                    at_tokens = slope(at_tokens, cap)
                grad.mul_(-pull.sum(1, keepdim=True))
                grad.scatter_add_(1, ids, pull * at_tokens if cap else pull)
                if grad_states is not None:
                    grad_states[chunk] = project_back(grad, weight) * scale
                if grad_weight is not None:
                    grad_weight.addmm_(grad.T, h)
                if grad_bias is not None:
                    grad_bias.add_(grad.sum(0), alpha=scale)
                del logits, grad
        types = [one if one is None else one.dtype for one in (states, weight, bias)]
        return *(one if one is None else one.to(kind) for one, kind in zip(grads, types)), None, None, None


def _chunks(states: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    size = chunk_rows(weight.shape[0])
    return [slice(start, start + size) for start in range(0, len(states), size)]
