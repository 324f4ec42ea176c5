"""The type to compute in, by what the hardware can do."""

import torch

from tract_lite.training.settings import PRECISIONS

# Triton's kernels, which Unsloth uses, begin here, also where torch has its own for older cards.
TRITON_CAPABILITY = 7


def pick_dtype(asked: str | None = None) -> tuple[torch.dtype, str]:
    """The type to compute in on this machine, and the reason for it.

    `asked`: "float32", "bfloat16" or "float16"; None leaves it to the hardware.
    Raises RuntimeError: the installed torch has no kernels for this card.
    Raises ValueError: another type is asked for, or float16 without a GPU.
    """
    if asked not in (None, *PRECISIONS):
        raise ValueError(f"the precision must be one of {', '.join(PRECISIONS)}, got {asked!r}")
    if not torch.cuda.is_available():
        if asked == "float16":
            raise ValueError("float16 needs a GPU: ask for bfloat16 or float32 on this machine")
        reason = f"{asked} on the CPU, as asked" if asked else "no GPU: float32 on the CPU"
        return getattr(torch, asked or "float32"), reason
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    built_for = [int(arch[3:].rstrip("abf")) // 10 for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    oldest = max(TRITON_CAPABILITY, min(built_for, default=0))
    if major < oldest:
        advice = f"this torch's kernels begin at {oldest}.0; choose another GPU, on Kaggle 'GPU T4 x2'"
        raise RuntimeError(f"{name} is too old (compute capability {major}.{minor}): {advice}")
    if asked:
        return getattr(torch, asked), f"{asked} on {name}, as asked"
    # torch.cuda.is_bf16_supported() also says yes where bf16 is emulated, as on a T4.
    if major >= 8:
        return torch.bfloat16, f"{name} computes bfloat16 (capability {major}.{minor})"
    return torch.float16, f"{name} has no bfloat16 units (capability {major}.{minor}): float16"
