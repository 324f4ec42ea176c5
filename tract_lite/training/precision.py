"""The type to compute in and that of the weights, by what the hardware can do."""

from typing import Any, Mapping

import torch

from tract_lite.training.settings import PRECISIONS

# Triton's kernels, which Unsloth uses, begin here, also where torch has its own for older cards.
TRITON_CAPABILITY = 7
# What torch calls the units of a CPU that multiply bfloat16: of x86 processors, and of Arm's.
BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 itself; where that is emulated, float32 is faster.

    Only oneDNN, which torch for macOS lacks, uses these units, and an older torch does not tell.
    """
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.backends.mkldnn.is_available() and any(known.get(name) for name in BFLOAT16_UNITS)


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
        if asked:
            return getattr(torch, asked), f"{asked} on the CPU, as asked"
        if has_bfloat16_units():
            return torch.bfloat16, "no GPU, and a CPU with bfloat16 units: bfloat16"
        return torch.float32, "no GPU: float32 on the CPU"
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


def pick_4bit(asked: bool | None = None) -> bool:
    """Whether the frozen weights are in 4 bits; None: on a GPU, whose memory they save.

    A CPU gains no speed from them, and its judge is then one of the seed model's own weights.
    """
    return torch.cuda.is_available() if asked is None else asked
