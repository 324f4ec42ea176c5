"""CoT-RAFT: cross-entropy plus the squared error of the expected score, from hidden states.

Shapes: B sequences, T positions, H hidden size, V vocabulary, K labels, N supervised positions.
Source: TRACT, Eq. 4.
"""

from dataclasses import dataclass

import torch

from tract_lite.loss.projection import capped_logits, chunk_rows, project_back, slope, times_slopes

IGNORE_INDEX = -100


@dataclass(frozen=True)
class CotRaftLoss:
    """`loss` = `ce` + raft_weight * `raft`: three scalars, of which `loss` alone has a gradient.

    `predictions` (B,): the RAIL expectation of each row, NaN where a row has no score.
    """

    loss: torch.Tensor
    ce: torch.Tensor
    raft: torch.Tensor
    predictions: torch.Tensor


def cot_raft_loss(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    score_positions: torch.Tensor,
    score_token_ids: torch.Tensor,
    score_values: torch.Tensor,
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
    """raft_weight * mean (E[score] - target)^2 over sequences + mean cross-entropy over tokens.

    Position t of `labels` holds the id of token t, -100 where nothing is learnt. The expectation is
    unnormalised: the softmax is over the whole vocabulary. Softmax and sums are in float32, or
    float64 where float64 comes in. Logits are logit_scale * (hidden_states @ lm_head_weight.T +
    head_bias) and, with a softcap c, then c * tanh(logits / c).

    Args:
        hidden_states: (B, T, H) last hidden states, before the vocabulary projection.
        lm_head_weight: (V, H); gets a gradient only if it requires one.
        labels: (B, T) token ids.
        score_positions: (B,) index t of each row's score token, -1 where it has none.
        score_token_ids, score_values: (K,) ids of the labels, and their values.
        targets: (B,) gold scores; ignored where a row has no score.
        raft_weight: weight of the squared error (lambda in the paper).
        ce_on_score: whether the score token is in the cross-entropy, as in the paper's formula.
        num_tokens, num_sequences: counts of the whole optimiser step; by default of this batch.
        softcap, logit_scale: what the model does with its logits, such as Gemma, Granite, Cohere.
        head_bias: (V,); gets a gradient only if it requires one.
    """
    dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    has_score = score_positions > 0
    is_score = torch.zeros_like(labels, dtype=torch.bool)
    is_score[has_score, score_positions[has_score]] = True
    is_token = labels != IGNORE_INDEX
    if not ce_on_score:
        is_token = is_token & ~is_score
    rows, positions = (is_token | is_score)[:, 1:].nonzero(as_tuple=True)
    token_mask = is_token[rows, positions + 1]
    score_mask = is_score[rows, positions + 1]

    tokens = at_least_one(token_mask.sum() if num_tokens is None else num_tokens, labels)
    sequences = at_least_one(score_mask.sum() if num_sequences is None else num_sequences, labels)
    # The gradient is formed in the forward pass, so each position carries its final weights.
    loss, ce, raft, expected = _CotRaft.apply(
        hidden_states[rows, positions],
        lm_head_weight,
        head_bias,
        labels[rows, positions + 1].clamp(min=0),
        token_mask.to(dtype) / tokens.to(dtype),
        score_mask.to(dtype) / sequences.to(dtype),
        targets.to(dtype)[rows].where(score_mask, 0),
        score_token_ids,
        score_values.to(dtype),
        float(raft_weight),
        softcap,
        float(logit_scale),
    )
    predictions = torch.full_like(targets, float("nan"), dtype=dtype)
    predictions[rows[score_mask]] = expected[score_mask]
    return CotRaftLoss(loss, ce, raft, predictions)


def at_least_one(count: torch.Tensor | int, like: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(count, device=like.device).clamp(min=1)


class _CotRaft(torch.autograd.Function):
    """The loss over N gathered positions, one chunk of logits at a time, gradient included."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, ce_weights, raft_weights, targets, ids, values, factor, cap, scale):
        dtype = ce_weights.dtype
        ce = torch.zeros((), dtype=dtype, device=hidden.device)
        raft = torch.zeros_like(ce)
        expected = torch.empty_like(ce_weights)
        grad_hidden = torch.zeros_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if ctx.needs_input_grad[2] else None
        size = chunk_rows(weight.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), size):
                chunk = slice(start, start + size)
                h, token = hidden[chunk].to(dtype) * scale, tokens[chunk, None]
                ce_weight, raft_weight = ce_weights[chunk], raft_weights[chunk]
                logits = capped_logits(h, weight, bias, cap, scale)
                token_logits, label_logits = logits.gather(1, token)[:, 0], logits[:, ids]
                top = logits.amax(1, keepdim=True)
                probabilities = logits.sub_(top).exp_()
                total = probabilities.sum(1, keepdim=True)
                probabilities.div_(total)
                log_total = (top + total.log())[:, 0]
                label_probabilities = probabilities[:, ids]
                y = label_probabilities @ values
                error = y - targets[chunk]
                ce += (ce_weight * (log_total - token_logits)).sum()
                raft += (raft_weight * error.square()).sum()
                expected[chunk] = y
                if any(ctx.needs_input_grad):
                    pull = 2 * factor * raft_weight * error
                    at_labels = label_probabilities * (ce_weight[:, None] + pull[:, None] * (values - y[:, None]))
                    at_token = -ce_weight
                    if cap:
                        times_slopes(probabilities, log_total, cap)
                        at_labels, at_token = (
                            at_labels * slope(label_logits, cap),
                            at_token * slope(token_logits, cap),
                        )
                    grad = probabilities.mul_((ce_weight - pull * y)[:, None])
                    grad[:, ids] = at_labels
                    grad.scatter_add_(1, token, at_token[:, None])
                    if grad_hidden is not None:
                        grad_hidden[chunk] = project_back(grad, weight) * scale
                    if grad_weight is not None:
                        grad_weight.addmm_(grad.T, h)
                    if grad_bias is not None:
                        grad_bias.add_(grad.sum(0), alpha=scale)
                    del grad
                # Else two chunks of logits are alive at once.
                del logits, probabilities
        ctx.grads = grad_hidden, grad_weight, grad_bias
        ctx.types = [tensor if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(ce, raft, expected)
        return ce + factor * raft, ce, raft, expected

    @staticmethod
    def backward(ctx, grad_loss, *_):
        # The factor of a gradient scaler is applied before the cast, so float16 does not underflow.
        grads = [None if grad is None else (grad * grad_loss).to(dtype) for grad, dtype in zip(ctx.grads, ctx.types)]
        return *grads, *[None] * 9
