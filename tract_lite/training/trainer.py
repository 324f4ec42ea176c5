"""transformers' Trainer with the CoT-RAFT loss, scaled by the counts of the optimiser step."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any, Iterator, Sequence

import psutil
import torch
from torch.utils.data import Sampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from tract_lite.data.jsonl import write_json
from tract_lite.loss.cot_raft import IGNORE_INDEX, CotRaftLoss, cot_raft_loss
from tract_lite.loss.label_trees import LabelTrees, cot_raft_tree_loss
from tract_lite.metrics import evaluate
from tract_lite.spec import JudgeSpec
from tract_lite.training.branches import extra_rows, label_trees, node_states, raft_factor
from tract_lite.training.encode import Example, LengthGroupedSampler, collate
from tract_lite.training.layers import head_options, lm_head_weight
from tract_lite.training.quiet import progress
from tract_lite.training.seed_model import compute_dtype, hidden_states
from tract_lite.training.settings import COMPLETE_FILE, NEAREST, TrainSettings

logger = logging.getLogger(__name__)

ROWS = (
    "labels of several tokens: here each sequence is read %.1f times more for them"
    "\n--remap 0-9, or a scale of wider steps, is the cheaper way"
)
# Of the figures of a step, those that are told; `stage.json` has the rest.
TOLD_FIGURES = ("ce", "raft", "score_mae", "eval_rmse", "eval_pearson", "tokens_per_second")


class CotRaftTrainer(Trainer):
    """Trains an adapter on examples and, with `validation`, scores these at each checkpoint."""

    model: Any

    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        spec: JudgeSpec,
        tokenizer: Any,
        out_dir: Path,
        settings: TrainSettings,
        validation: Sequence[Example] = (),
    ):
        steps = settings.steps(len(examples))
        learning_rate, reason = settings.pick_learning_rate(steps)
        logger.info("%d sequences, %d steps, learning rate %g (%s)", len(examples), steps, learning_rate, reason)
        if rows := extra_rows(model, examples):
            logger.warning(ROWS, rows)
        arguments = _arguments(settings, out_dir, learning_rate, compute_dtype(model), bool(validation))
        self.settings, self._spec, self._pad_id, self.end_id = settings, spec, tokenizer.pad_token_id, spec.eos_id
        # One token after the marker tells all, in every sequence.
        self.is_flat = spec.tokens.is_flat and not spec.any_scale and settings.target == NEAREST
        self._lengths = [len(example.ids) for example in examples]
        self.total_tokens = sum(self._lengths) * steps / -(-len(examples) // settings.batch_size)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=list(examples),
            eval_dataset=list(validation) or None,
            compute_metrics=_agreement,
            data_collator=self._collate,
            callbacks=[_MarkComplete()],
        )
        if self.pop_callback(ProgressCallback):
            self.add_callback(_OneBar())
        # Our loss divides by the counts of the step, so Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self.head, self.head_options = lm_head_weight(model), head_options(model)
        self._score_ids = torch.tensor([label[0] for label in spec.label_ids], device=self.args.device)
        self._score_values = torch.tensor(spec.scale.values, device=self.args.device)
        self._meter = _Meter(self.args.device)
        self._logged = time.perf_counter()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one step, each with the token and sequence counts of all of them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(2, device=device)
        for batch in batches:
            counts[0] += (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
            counts[0] -= 0 if self.settings.ce_on_score else batch["score_lengths"].sum()
            counts[1] += len(batch["labels"])
        # DDP averages gradients over processes, so each one divides by its share of the total.
        counts = self.accelerator.reduce(counts, "sum") / self.accelerator.num_processes
        for batch in batches:
            batch["num_tokens"], batch["num_sequences"] = counts[0], counts[1]
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = self.loss_of(model, inputs)
        self._meter.add(result, inputs)
        return result.loss

    def prediction_step(self, model: Any, inputs: dict, prediction_loss_only: bool, ignore_keys: Any = None) -> tuple:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            result = self.loss_of(model, inputs)
        predictions, targets = result.predictions, inputs["targets"]
        if self._spec.any_scale:
            # Of several scales, each error counts by its share of the width.
            ends = [(min(one.tokens.values), one.tokens.width) for one in inputs["examples"]]
            low, width = torch.tensor(ends, dtype=targets.dtype, device=targets.device).T
            predictions, targets = (predictions - low) / width, (targets - low) / width
        return result.loss, predictions, targets

    def loss_of(self, model: Any, inputs: dict[str, Any]) -> CotRaftLoss:
        """The loss of one micro-batch, by the counts of its step where it brings them."""
        batch: dict[str, Any] = dict(inputs)
        examples, lengths, ids = batch.pop("examples"), batch.pop("score_lengths"), batch.pop("input_ids")
        # Padding is behind all real tokens, which never read it: a mask would only take time.
        unmasked = torch.ones_like(batch.pop("attention_mask"))
        batch |= {"ce_on_score": self.settings.ce_on_score, **self.head_options}
        if self.is_flat:
            hidden = hidden_states(model, ids, unmasked)
            batch |= {"score_token_ids": self._score_ids, "score_values": self._score_values}
            factor = raft_factor(self._spec.scale.width)
            return cot_raft_loss(hidden, self.head, raft_weight=self.settings.raft_weight * factor, **batch)
        trees, hidden, states = self.read_trees(model, examples, ids)
        batch |= {"trees": trees, "node_states": states}
        batch["score_spans"] = torch.stack([batch.pop("score_positions"), lengths], dim=1)
        return cot_raft_tree_loss(hidden, self.head, raft_weight=self.settings.raft_weight, **batch)

    def read_trees(
        self, model: Any, examples: Sequence[Example], ids: torch.Tensor
    ) -> tuple[LabelTrees, torch.Tensor, torch.Tensor]:
        """The labels' trees of sequences, the hidden states of these, and of the trees' nodes."""
        trees, nodes = label_trees(examples, self.end_id)
        return trees.to(ids.device), *node_states(model, examples, ids, nodes)

    def _collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        return collate(examples, self._pad_id)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._meter.read(self.accelerator))
        # Of all calls together: what was logged before a stop comes back with the checkpoint.
        now, before = time.perf_counter(), (entry.get("seconds", 0.0) for entry in self.state.log_history)
        logs["seconds"] = max(before, default=0.0) + now - self._logged
        self._logged = now
        super().log(logs, start_time)

    def _get_train_sampler(self, *_: Any) -> Sampler:
        return LengthGroupedSampler(self._lengths, self.settings.batch_size, self.settings.seed)


def _arguments(
    settings: TrainSettings, out_dir: Path, learning_rate: float, dtype: torch.dtype, validated: bool
) -> TrainingArguments:
    size, every, on_gpu = settings.micro_batch_size, settings.save_every, torch.cuda.is_available()
    options: dict[str, Any] = {"num_train_epochs": settings.epochs, "max_steps": settings.max_steps}
    options |= {"per_device_train_batch_size": size, "per_device_eval_batch_size": size, "seed": settings.seed}
    options |= {"learning_rate": learning_rate, "warmup_steps": settings.warmup_ratio}
    options |= {"lr_scheduler_type": settings.scheduler, "optim": settings.optimizer, "weight_decay": 0.0}
    options |= {"max_grad_norm": settings.max_grad_norm, "remove_unused_columns": False}
    options |= {"fp16": dtype == torch.float16, "bf16": dtype == torch.bfloat16}
    # How often a process computes hangs on its own sequences, and buffers are constants.
    options |= {"ddp_broadcast_buffers": False}
    options |= {"use_cpu": not on_gpu, "dataloader_pin_memory": on_gpu}
    options |= {"save_steps": every, "save_total_limit": 2, "logging_steps": settings.log_every, "report_to": "none"}
    options |= {"eval_strategy": "steps" if validated else "no", "eval_steps": every}
    options |= {"metric_for_best_model": "rmse", "greater_is_better": False}
    arguments = TrainingArguments(str(out_dir), **options)
    arguments.gradient_accumulation_steps = settings.accumulation(arguments.world_size)
    # Several GPUs and no launcher: Trainer would multiply the batch, and spread the model.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _agreement(scored: Any) -> dict[str, float]:
    """Of the validation records, the figures by which a checkpoint is chosen."""
    figures = evaluate(scored.predictions, scored.label_ids)
    # Of constant predictions there is no correlation.
    return {name: figures[name] for name in ("pearson", "rmse") if not math.isnan(figures[name])}


class _Meter:
    """Means of the loss terms since the last reading, tokens per second, peak memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._peak_bytes = device, 0
        self._reset()

    def _reset(self) -> None:
        # ce and squared error in units of a step, absolute error, scores, steps, tokens
        self._sums = torch.zeros(6, dtype=torch.float64, device=self._device)
        self._since = time.perf_counter()

    def add(self, result: CotRaftLoss, inputs: dict[str, torch.Tensor]) -> None:
        # The most so far on the GPU where there is one, else what the process has now.
        on_gpu = torch.cuda.is_available()
        in_use = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
        self._peak_bytes = max(self._peak_bytes, in_use)
        errors = (result.predictions - inputs["targets"])[result.predictions.isfinite()].abs()
        count = torch.tensor(len(errors), device=self._device)
        steps, tokens = count / inputs["num_sequences"], inputs["attention_mask"].sum()
        self._sums += torch.stack([result.ce, result.raft, errors.sum(), count, steps, tokens])

    def read(self, accelerator: Any) -> dict[str, float]:
        """The figures of all processes together."""
        ce, squared, absolute, scores, steps, tokens = accelerator.reduce(self._sums, "sum").tolist()
        seconds = time.perf_counter() - self._since
        self._reset()
        steps, scores = max(steps, 1e-9), max(scores, 1)
        figures = {"ce": ce / steps, "raft": squared / steps, "score_mae": absolute / scores}
        return figures | {"tokens_per_second": tokens / seconds, "peak_memory_gb": self._peak_bytes / 2**30}


class _OneBar(ProgressCallback):
    """One bar, of the steps; the log has a line for each entry of theirs."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            name = f"training {Path(args.output_dir).name}"
            self.training_bar = progress(name, state.max_steps, state.global_step)

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """Validation has no bar of its own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        figures = [f"{name} {logs[name]:.4g}" for name in TOLD_FIGURES if name in logs]
        if figures and state.is_world_process_zero:
            logger.info("step %d: %s", state.global_step, ", ".join(figures))
        if self.training_bar is not None and "score_mae" in logs:
            self.training_bar.set_postfix_str(f"scores off by {logs['score_mae']:.2f}", refresh=False)


class _MarkComplete(TrainerCallback):
    """Writes the sizes of a checkpoint's files beside them, last: killed runs leave half of one."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / COMPLETE_FILE, _sizes(folder))


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint's files are there as they were written: a copy may lack some."""
    try:
        sizes = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return sizes.items() <= _sizes(checkpoint).items()


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
