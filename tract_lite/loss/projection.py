"""Hidden states to logits and their gradients back, a chunk of positions at a time."""

import torch

# Bounds the logits alive at once: 64 MiB in float32.
CHUNK_ELEMENTS = 2**24
# Rows of a chunk of logits whose slopes under a cap are found at once.
SLOPE_ROWS = 4
VOCABULARY_BLOCK = 4096


def chunk_rows(vocabulary_size: int) -> int:
    """How many positions make a chunk."""
    return max(1, CHUNK_ELEMENTS // vocabulary_size)


def capped_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cap: float | None, scale: float
) -> torch.Tensor:
    """Logits (N, V) in the type of `hidden`, which is already multiplied by `scale`."""
    logits = project(hidden, weight)
    if bias is not None:
        logits.add_(bias.to(logits.dtype), alpha=scale)
    if cap:
        logits.div_(cap).tanh_().mul_(cap)
    return logits


def project(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logits (N, V) in the type of `hidden`, without a copy of `weight` in that type."""
    if weight.dtype == hidden.dtype:
        return hidden @ weight.T
    logits = hidden.new_empty(len(hidden), len(weight))
    for block, out in zip(weight.split(VOCABULARY_BLOCK), logits.split(VOCABULARY_BLOCK, dim=1)):
        torch.mm(hidden, block.to(hidden.dtype).T, out=out)
    return logits


def project_back(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gradient (N, H) of the hidden states from that of the logits (N, V)."""
    if weight.dtype == grad.dtype:
        return grad @ weight
    back = grad.new_zeros(len(grad), weight.shape[1])
    for block, columns in zip(weight.split(VOCABULARY_BLOCK), grad.split(VOCABULARY_BLOCK, dim=1)):
        back.addmm_(columns, block.to(grad.dtype))
    return back


def slope(capped: torch.Tensor, cap: float) -> torch.Tensor:
    """The slope of c * tanh(x / c) where it has these values."""
    return 1 - (capped / cap).square()


def times_slopes(probabilities: torch.Tensor, log_total: torch.Tensor, cap: float) -> None:
    """Multiply probabilities (N, V) by the cap's slopes at their logits, in place.

    The logits are found again, a few rows at a time: kept, they would take as much memory again.
    Where a probability is 0, so is the product.
    """
    for rows, totals in zip(probabilities.split(SLOPE_ROWS), log_total.split(SLOPE_ROWS)):
        capped = rows.log().add_(totals[:, None]).clamp_(-cap, cap)
        rows.mul_(capped.div_(cap).square_().neg_().add_(1))
