"""One stage of CoT-RAFT training on transformers' Trainer; the recipe calls it twice."""

from __future__ import annotations

import logging
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from tract_lite.encode import Example, LengthGroupedSampler, collate, encode_records
from tract_lite.jsonl import write_json
from tract_lite.loss import IGNORE_INDEX, CotRaftLoss, cot_raft_loss
from tract_lite.records import Record
from tract_lite.seed import for_training, hidden_states, lm_head_weight, pick_dtype
from tract_lite.spec import JudgeSpec
from tract_lite.vocabulary import TransformersVocabulary

logger = logging.getLogger(__name__)

RESULT_FILE = "stage.json"
COMPLETE_FILE = "complete"
PAPER_LEARNING_RATE = 1e-5
PAPER_STEPS = 3000
SHORT_RUN_LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one stage; the defaults are TRACT's where the paper has them.

    `learning_rate` None: 1e-5 as in the paper, or 2e-4 for a run of fewer than 3,000 steps.
    `batch_size` counts the sequences of one optimiser step, `micro_batch_size` those computed at
    once. `max_steps` ends a stage before its epochs do.
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
    max_steps: int = -1
    save_every: int = 200
    log_every: int = 10
    seed: int = 42

    def __post_init__(self) -> None:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of "
                             f"micro_batch_size ({self.micro_batch_size})")


def train_stage(model: Any, tokenizer: Any, records: Sequence[Record], spec: JudgeSpec,
                out_dir: str | Path, settings: TrainSettings = TrainSettings()) -> dict[str, Any]:
    """Train the adapter of `model` (from `add_lora`) on records with reasonings and gold scores.

    Goes on from the newest complete checkpoint in `out_dir`. Writes the adapter and its spec to
    `out_dir/adapter` and, last, `out_dir/stage.json`, which is returned: counts of examples and of
    dropped records by reason, settings, log.

    Raises:
        ValueError: no record can be trained on.
    """
    out_dir = Path(out_dir)
    examples, dropped = encode_records(records, spec, TransformersVocabulary(tokenizer))
    for reason, count in sorted(dropped.items()):
        logger.warning("%d of %d records are dropped: %s", count, len(records), reason)
    if not examples:
        raise ValueError(f"no record can be trained on, out of {len(records)}: {dict(dropped)}")
    for_training(model)
    trainer = CotRaftTrainer(model, examples, spec, tokenizer, out_dir, settings)
    trainer.train(resume_from_checkpoint=newest_complete_checkpoint(out_dir))
    adapter = out_dir / "adapter"
    model.save_pretrained(adapter)
    spec.save(adapter)
    result = {
        "records": len(records), "examples": len(examples), "dropped": dict(dropped),
        "tokens_read": trainer.total_tokens,
        "settings": asdict(settings), "learning_rate": trainer.args.learning_rate,
        "log": trainer.state.log_history,
    }
    write_json(out_dir / RESULT_FILE, result)
    return result


def newest_complete_checkpoint(folder: Path) -> str | None:
    """The checkpoint with the most steps among those that were written to the end."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE_FILE}")]
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return str(newest) if newest else None


def pick_learning_rate(settings: TrainSettings, steps: int) -> tuple[float, str]:
    """The learning rate of a stage of `steps` optimiser steps, and the reason for it."""
    if settings.learning_rate is not None:
        return settings.learning_rate, "as asked"
    if steps >= PAPER_STEPS:
        return PAPER_LEARNING_RATE, "the paper's"
    return SHORT_RUN_LEARNING_RATE, (
        f"{steps} steps are too few for the paper's {PAPER_LEARNING_RATE:g}, which suits its 25,000"
    )


class CotRaftTrainer(Trainer):
    """Trainer with the CoT-RAFT loss, scaled by the counts of the whole optimiser step."""

    def __init__(self, model: Any, examples: Sequence[Example], spec: JudgeSpec, tokenizer: Any,
                 out_dir: Path, settings: TrainSettings):
        steps_per_epoch = -(-len(examples) // settings.batch_size)
        steps = int(settings.epochs * steps_per_epoch)
        if settings.max_steps > 0:
            steps = settings.max_steps
        learning_rate, reason = pick_learning_rate(settings, steps)
        logger.info("%d sequences, %d steps, learning rate %g (%s)",
                    len(examples), steps, learning_rate, reason)
        dtype, _ = pick_dtype()
        arguments = TrainingArguments(
            output_dir=str(out_dir),
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps,
            per_device_train_batch_size=settings.micro_batch_size,
            gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type=settings.scheduler,
            warmup_steps=settings.warmup_ratio,
            max_grad_norm=settings.max_grad_norm,
            weight_decay=0.0,
            fp16=dtype == torch.float16,
            bf16=dtype == torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            save_steps=settings.save_every,
            save_total_limit=2,
            logging_steps=settings.log_every,
            remove_unused_columns=False,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=settings.seed,
        )
        # Several GPUs and no launcher: Trainer would multiply the batch, and spread 16-bit seeds.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        self.settings = settings
        self._lengths = [len(example.ids) for example in examples]
        self.total_tokens = sum(self._lengths) * steps / steps_per_epoch
        super().__init__(
            model=model, args=arguments, train_dataset=list(examples),
            data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
            callbacks=[_MarkComplete()],
        )
        # Our loss divides by the counts of the step, so Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self._head = lm_head_weight(model)
        self._score_ids = torch.tensor(spec.label_ids, device=self.args.device)
        self._score_values = torch.tensor(spec.scale.values, device=self.args.device)
        self._meter = _Meter()

    def _get_train_sampler(self, *_: Any) -> Sampler:
        return LengthGroupedSampler(self._lengths, self.settings.batch_size, self.settings.seed)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int,
                          device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one step, each with the token and sequence counts of all of them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(2, device=device)
        for batch in batches:
            has_score = batch["score_positions"] > 0
            counts[0] += (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
            counts[0] -= 0 if self.settings.ce_on_score else has_score.sum()
            counts[1] += has_score.sum()
        # DDP averages gradients over processes, so each one divides by its share of the total.
        counts = self.accelerator.reduce(counts, "sum") / self.accelerator.num_processes
        for batch in batches:
            batch["num_tokens"], batch["num_sequences"] = counts[0], counts[1]
        return batches, num_items

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor],
                     return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        hidden = hidden_states(model, inputs["input_ids"], inputs["attention_mask"])
        result = cot_raft_loss(
            hidden, self._head, inputs["labels"], inputs["score_positions"], self._score_ids,
            self._score_values, inputs["targets"], raft_weight=self.settings.raft_weight,
            ce_on_score=self.settings.ce_on_score, num_tokens=inputs["num_tokens"],
            num_sequences=inputs["num_sequences"],
        )
        self._meter.add(result, inputs)
        return (result.loss, {"predictions": result.predictions}) if return_outputs else result.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._meter.read())
        super().log(logs, start_time)


class _Meter:
    """Means of the loss terms since the last reading, tokens per second, peak memory."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._ce = self._squared = self._absolute = self._steps = 0.0
        self._scores = self._tokens = 0
        self._since = time.perf_counter()

    def add(self, result: CotRaftLoss, inputs: dict[str, torch.Tensor]) -> None:
        scored = result.predictions.isfinite()
        self._ce += result.ce
        self._squared += result.raft
        self._absolute += (result.predictions - inputs["targets"])[scored].abs().sum()
        self._scores += scored.sum()
        self._steps += scored.sum() / inputs["num_sequences"]
        self._tokens += inputs["attention_mask"].sum()

    def read(self) -> dict[str, float]:
        steps = max(float(self._steps), 1e-9)
        seconds = max(time.perf_counter() - self._since, 1e-9)
        figures = {
            "ce": float(self._ce) / steps,
            "raft": float(self._squared) / steps,
            "score_mae": float(self._absolute) / max(int(self._scores), 1),
            "tokens_per_second": int(self._tokens) / seconds,
            "peak_memory_gb": peak_memory_gb(),
        }
        self._reset()
        return figures


def peak_memory_gb() -> float:
    """The most memory used so far, in GiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class _MarkComplete(TrainerCallback):
    """Marks a checkpoint as complete, last: a killed run leaves half-written ones behind."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE_FILE).touch()
