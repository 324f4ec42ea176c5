"""Settings of one training stage; the defaults are TRACT's where the paper has them."""

from dataclasses import dataclass
from typing import TypedDict

from tract_lite.scale import ScoreScale
from tract_lite.spec import Sampling

# What a stage leaves in its folder when it is done, and the folder of its adapter there.
RESULT_FILE, ADAPTER = "stage.json", "adapter"
# Says that a checkpoint is whole.
COMPLETE_FILE = "complete.json"

NEAREST, SOFT = TARGETS = ("nearest", "soft")

PRECISIONS = ("float32", "bfloat16", "float16")

PAPER_LEARNING_RATE = 1e-5
PAPER_STEPS = 3000
SHORT_RUN_LEARNING_RATE = 2e-4


class SeedOptions(TypedDict, total=False):
    """How a seed model is loaded, and the fields of the spec by which it is asked.

    `max_length` counts the tokens of prompt, reasoning and score. `precision` is the type to
    compute in: "float32", "bfloat16", "float16"; `load_in_4bit` is of the weights. None: what suits
    the machine. `units` and `any_scale`: as in `JudgeSpec`.
    """

    template: str
    marker: str
    max_length: int
    sampling: Sampling
    precision: str | None
    load_in_4bit: bool | None
    units: ScoreScale | None
    any_scale: bool


@dataclass(frozen=True)
class TrainSettings:
    """How one stage is trained.

    `learning_rate` None: 1e-5 as in the paper, or 2e-4 for a run of fewer than 3,000 steps.
    `batch_size`: sequences of one optimiser step, over all processes; `micro_batch_size`: those
    that a process computes at once. `max_steps` ends a stage before its epochs do. `optimizer`: a
    name of transformers, such as "paged_adamw_8bit". `max_grad_norm` 0 clips nothing. Every
    `save_every` steps, and at the end, a checkpoint is written and validation records are scored.

    `raft_weight` is for a scale as wide as 1 to 5: on another one, errors count by their share of
    its width. `target`: the cross-entropy of a gold score between two labels is that of the
    "nearest" one, or "soft": of both, in proportion; see `encode_record`.

    `direct_share`: that share of the sequences has no reasoning, so that the judge answers both
    ways; at 1 it answers directly alone. See `encode_records`.
    Raises ValueError: `batch_size` is no multiple of `micro_batch_size`, `direct_share` is not
        from 0 to 1, or an unknown `target`.
    """

    epochs: float = 2.0
    batch_size: int = 8
    micro_batch_size: int = 1
    learning_rate: float | None = None
    warmup_ratio: float = 0.1
    scheduler: str = "cosine"
    raft_weight: float = 1.0
    ce_on_score: bool = True
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch_fused"
    max_steps: int = -1
    save_every: int = 100
    log_every: int = 10
    seed: int = 42
    direct_share: float = 0.0
    target: str = NEAREST

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {self.target!r}")
        if not 0 <= self.direct_share <= 1:
            raise ValueError(f"direct_share must be from 0 to 1, got {self.direct_share}")
        self.accumulation(1)

    def accumulation(self, processes: int) -> int:
        """Micro-batches of one optimiser step in each process.
        Raises ValueError: `batch_size` can't be split so.
        """
        at_once = self.micro_batch_size * processes
        if self.batch_size % at_once:
            size, times = self.micro_batch_size, f" x {processes} processes" if processes > 1 else ""
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size ({size}){times}")
        return self.batch_size // at_once

    def steps(self, examples: int) -> int:
        """Optimiser steps of a stage on that many sequences."""
        if self.max_steps > 0:
            return self.max_steps
        return int(self.epochs * -(-examples // self.batch_size))

    def pick_learning_rate(self, steps: int) -> tuple[float, str]:
        """The learning rate of a stage of `steps` optimiser steps, and the reason for it."""
        if self.learning_rate is not None:
            return self.learning_rate, "as the settings say"
        if steps >= PAPER_STEPS:
            return PAPER_LEARNING_RATE, "the paper's"
        reason = f"{steps} steps are too few for the paper's {PAPER_LEARNING_RATE:g}, which suits its 25,000"
        return SHORT_RUN_LEARNING_RATE, reason


DEFAULT_SETTINGS = TrainSettings()
