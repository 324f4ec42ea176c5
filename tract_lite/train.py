"""One stage of CoT-RAFT training, from records to an adapter; the recipe calls it twice."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, Sequence

import torch
from peft import set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from tract_lite.encode import Example, encode_records
from tract_lite.jsonl import write_json
from tract_lite.preflight import preflight
from tract_lite.records import Record
from tract_lite.seed import for_training
from tract_lite.settings import TrainSettings
from tract_lite.spec import JudgeSpec
from tract_lite.trainer import CotRaftTrainer, is_complete
from tract_lite.vocabulary import TransformersVocabulary

logger = logging.getLogger(__name__)

RESULT_FILE = "stage.json"


def train_stage(model: Any, tokenizer: Any, records: Sequence[Record], spec: JudgeSpec,
                out_dir: str | Path, settings: TrainSettings = TrainSettings(), *,
                validation: Sequence[Record] = ()) -> dict[str, Any]:
    """Train the adapter of `model` (from `add_lora`) on records with reasonings and gold scores.

    With `validation` records, their expected scores after their own reasonings are measured at each
    checkpoint (Pearson, RMSE), and the adapter with the lowest RMSE is kept; else the last one.
    Goes on from the newest complete checkpoint in `out_dir`. Writes the adapter and its spec to
    `out_dir/adapter` and, last, `out_dir/stage.json`, which is returned: counts of examples and of
    dropped records by reason, settings, the step that is kept, log.

    Raises:
        ValueError: no record can be trained on, or the batch can't be split over the processes.
        RuntimeError: the preflight found a fault, or the GPU's memory is too small.
    """
    out_dir = Path(out_dir)
    vocabulary = TransformersVocabulary(tokenizer)
    examples, dropped = encode_records(records, spec, vocabulary)
    validated, unscored = encode_records(validation, spec, vocabulary)
    _warn(dropped, len(records), "records")
    _warn(unscored, len(validation), "validation records")
    if not examples:
        raise ValueError(f"no record can be trained on, out of {len(records)}: {dict(dropped)}")
    for_training(model)
    trainer = CotRaftTrainer(model, examples, spec, tokenizer, out_dir, settings, validated)
    try:
        preflight(trainer, examples, spec, vocabulary, tokenizer.pad_token_id)
        trainer.train(resume_from_checkpoint=newest_complete_checkpoint(out_dir))
    except torch.OutOfMemoryError as error:
        raise RuntimeError(_memory_advice(examples, settings)) from error
    step = _take_best(trainer, out_dir)
    result = {
        "records": len(records), "examples": len(examples), "dropped": dict(dropped),
        "validation": len(validated), "kept_step": step, "tokens_read": trainer.total_tokens,
        "settings": asdict(settings), "learning_rate": trainer.args.learning_rate,
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        adapter = out_dir / "adapter"
        model.save_pretrained(adapter)
        spec.save(adapter)
        write_json(out_dir / RESULT_FILE, result)
    trainer.accelerator.wait_for_everyone()
    return result


def newest_complete_checkpoint(folder: Path) -> str | None:
    """The checkpoint with the most steps among those that were written to the end."""
    complete = filter(is_complete, folder.glob("checkpoint-*"))
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return str(newest) if newest else None


def _take_best(trainer: CotRaftTrainer, out_dir: Path) -> int:
    """Put the best validated adapter back into the model; returns its step.

    The checkpoint is named by its step: a run folder may have been moved since.
    """
    last, best = trainer.state.global_step, trainer.state.best_global_step
    if best in (None, last):
        return last
    adapter = load_file(out_dir / f"checkpoint-{best}" / SAFETENSORS_WEIGHTS_NAME)
    set_peft_model_state_dict(trainer.model, adapter)
    logger.info("kept the adapter of step %d of %d, the best on the validation records", best, last)
    return best


def _warn(dropped: dict[str, int], count: int, what: str) -> None:
    for reason, number in sorted(dropped.items()):
        logger.warning("%d of %d %s are dropped: %s", number, count, what, reason)


def _memory_advice(examples: Sequence[Example], settings: TrainSettings) -> str:
    longest = max(len(example.ids) for example in examples)
    smaller = ("a smaller micro_batch_size, " if settings.micro_batch_size > 1 else
               "a smaller max_length (longer records are dropped), ")
    return (f"out of GPU memory with {settings.micro_batch_size} sequences of up to {longest} "
            f"tokens at once: take {smaller}gradient checkpointing, or a smaller seed")
