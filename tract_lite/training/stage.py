"""One stage of CoT-RAFT training, from records to an adapter; the method calls it twice."""

import hashlib
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Sequence, Unpack

import torch
from accelerate import PartialState
from peft import set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from tqdm.contrib.logging import logging_redirect_tqdm

from tract_lite.data.files import fingerprint
from tract_lite.data.jsonl import read_json, write_json
from tract_lite.data.places import content_of
from tract_lite.data.resume import claim
from tract_lite.data.scales import brings_others
from tract_lite.record import Record
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec
from tract_lite.training.encode import encode_records
from tract_lite.training.precision import pick_4bit
from tract_lite.training.preflight import preflight
from tract_lite.training.seed_model import (
    add_lora,
    check_length,
    for_training,
    free_memory,
    longest_sequence,
    open_seed_model,
)
from tract_lite.training.settings import ADAPTER, DEFAULT_SETTINGS, RESULT_FILE, SOFT, SeedOptions, TrainSettings
from tract_lite.training.trainer import CotRaftTrainer, is_complete
from tract_lite.vocabulary import TransformersVocabulary

logger = logging.getLogger(__name__)

# What a stage is made from, so that a second call goes on with the same one.
HOW_FILE = "stage_settings.json"


def train_adapter(
    records: Sequence[Record],
    out: str | Path,
    *,
    seed_model: str | Path,
    scale: ScoreScale,
    settings: TrainSettings = DEFAULT_SETTINGS,
    validation: Sequence[Record] = (),
    gradient_checkpointing: bool = True,
    start: str | Path | None = None,
    **options: Unpack[SeedOptions],
) -> Path:
    """Train one stage (TRACT, section 3): a new adapter on the seed model, which is freed then.

    `seed_model`: a folder or a hub id. `scale`: that of records which bring none of their own;
    where some bring others, the judge is one of any scale. `units`: the scale of the gold scores,
    where `scale` has other labels for them (`ScoreScale.remapped`). `settings` and `validation` as
    for `train_stage`, which leaves its files in `out`. `start`: the folder of an adapter of the
    same seed model, whose weights the new one begins with. A stage that is there is not trained
    again, and one that was stopped goes on. Returns the folder of the adapter, for
    `Judge.from_adapter`.
    Raises ValueError: no usable record, some have scales of their own beside `units`, or `out`
        holds a stage of other records or settings.
    Raises RuntimeError: the preflight found a fault, or the GPU's memory is too small.
    """
    out = Path(out)
    if brings_others([*records, *validation], scale, options.get("units")):
        options["any_scale"] = True
    begun = (out / RESULT_FILE).exists() or newest_complete_checkpoint(out)
    if options.get("load_in_4bit") is None:
        # What the machine that began it has chosen: the run may have been moved since.
        kept = read_json(out / HOW_FILE).get("load_in_4bit") if begun else None
        options["load_in_4bit"] = pick_4bit() if kept is None else kept
    if PartialState().is_main_process:
        # Left-out options are None here, so that leaving one out at a second call is a change.
        how = {**dict.fromkeys(SeedOptions.__annotations__), **options, "seed_model": str(seed_model)}
        how |= {"seed_model_sha256": content_of(seed_model), "scale": str(scale)}
        # Those that are left out are None in both.
        units, any_scale = options.get("units"), options.get("any_scale")
        how |= {"units": str(units) if units else None, "any_scale": any_scale or None}
        how |= {"sampling": options.get("sampling") and asdict(options["sampling"])}
        how |= {"start": fingerprint(Path(start) / SAFETENSORS_WEIGHTS_NAME) if start else None}
        # How many sequences are computed at once changes no weight, and is what memory runs out by.
        how |= {"settings": {name: value for name, value in asdict(settings).items() if name != "micro_batch_size"}}
        how |= {"records_sha256": _digest(records), "validation_sha256": _digest(validation)}
        if not begun:
            # Nothing is trained yet, so nothing is lost.
            (out / HOW_FILE).unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        claim(out / HOW_FILE, how)
    if not (out / RESULT_FILE).exists():
        model, tokenizer, spec = open_seed_model(seed_model, scale, **options)
        content = {"seed_model_sha256": content_of(seed_model)}
        spec = replace(spec, method={**spec.method, **asdict(settings), **content})
        model = add_lora(model, gradient_checkpointing=gradient_checkpointing, seed=settings.seed)
        if start:
            set_peft_model_state_dict(model, load_file(Path(start) / SAFETENSORS_WEIGHTS_NAME))
        train_stage(model, tokenizer, records, spec, out, settings, validation=validation)
        del model
        free_memory()
    return out / ADAPTER


def _digest(records: Sequence[Record]) -> str:
    """A hash of what is learnt from the records."""
    learnt = repr([(one.key, one.score, one.feedback, one.feedback_ids, *one.gold_scores) for one in records])
    return hashlib.sha256(learnt.encode("utf-8", "backslashreplace")).hexdigest()


def train_stage(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    spec: JudgeSpec,
    out_dir: str | Path,
    settings: TrainSettings = DEFAULT_SETTINGS,
    *,
    validation: Sequence[Record] = (),
) -> dict[str, Any]:
    """Train the adapter of `model` (from `add_lora`) on records with reasonings and gold scores.

    `validation` records are scored after their own reasonings at each checkpoint (Pearson, RMSE),
    directly where all training is, and the adapter with the lowest RMSE is kept; without them, the
    last one. Goes on from the newest complete checkpoint in `out_dir`. Writes the adapter and its
    spec to `out_dir/adapter` and, last, `out_dir/stage.json`, which is returned: counts of
    examples, of `direct` ones among them, and of dropped records by reason, settings, the step
    that is kept, log.
    Raises ValueError: no record can be trained on, the spec allows longer sequences than the model
        reads, or the batch can't be split over the processes.
    Raises RuntimeError: the preflight found a fault, or the GPU's memory is too small.
    """
    out_dir = Path(out_dir)
    check_length(longest_sequence(model), spec.max_length)
    vocabulary = TransformersVocabulary(tokenizer)
    share = settings.direct_share
    how: dict[str, Any] = {"direct_share": share, "soft": settings.target == SOFT, "seed": settings.seed}
    examples, dropped = encode_records(records, spec, vocabulary, **how, required=True)
    validated, unscored = encode_records(validation, spec, vocabulary, direct_share=float(share == 1))
    for what, given, reasons in (("records", records, dropped), ("validation records", validation, unscored)):
        for reason, number in sorted(reasons.items()):
            logger.warning("%d of %d %s are dropped: %s", number, len(given), what, reason)
    for_training(model)
    trainer = CotRaftTrainer(model, examples, spec, tokenizer, out_dir, settings, validated)
    try:
        preflight(trainer, examples, spec, vocabulary, tokenizer.pad_token_id)
        # What is logged stands above the bar.
        with logging_redirect_tqdm():
            trainer.train(resume_from_checkpoint=newest_complete_checkpoint(out_dir))
    except torch.OutOfMemoryError as error:
        count, longest = settings.micro_batch_size, max(len(example.ids) for example in examples)
        asked = f"out of GPU memory with {count} sequences of up to {longest} tokens at once"
        smaller = "micro_batch_size" if count > 1 else "max_length (longer records are dropped)"
        advice = f"take a smaller {smaller}, gradient checkpointing, or a smaller seed model"
        raise RuntimeError(f"{asked}: {advice}") from error
    result: dict[str, Any] = {"records": len(records), "examples": len(examples), "dropped": dict(dropped)}
    result |= {"direct": sum(example.is_direct for example in examples)}
    result |= {"validation": len(validated), "kept_step": _take_best(trainer, out_dir)}
    result |= {"tokens_read": trainer.total_tokens, "settings": asdict(settings)}
    result |= {"learning_rate": trainer.args.learning_rate, "log": trainer.state.log_history}
    if trainer.is_world_process_zero():
        adapter = out_dir / ADAPTER
        model.save_pretrained(adapter)
        spec.save(adapter)
        write_json(out_dir / RESULT_FILE, result)
        logger.info("%s: %s", out_dir.name, _told(result, trainer.state.global_step))
    trainer.accelerator.wait_for_everyone()
    return result


def newest_complete_checkpoint(folder: Path) -> str | None:
    """The checkpoint with the most steps among those that were written to the end."""
    complete = [path for path in folder.glob("checkpoint-*") if is_complete(path)]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def _take_best(trainer: CotRaftTrainer, out_dir: Path) -> int:
    """Put the best validated adapter back into the model; returns its step."""
    last, best = trainer.state.global_step, trainer.state.best_global_step
    if best in (None, last):
        return last
    # By the step, and not by the path that Trainer knows: a run folder may have been moved since.
    set_peft_model_state_dict(trainer.model, load_file(out_dir / f"checkpoint-{best}" / SAFETENSORS_WEIGHTS_NAME))
    return best


def _told(result: dict[str, Any], steps: int) -> str:
    """What came of a stage, in a line."""
    told = f"{result['examples']:,} sequences, {steps:,} steps at a learning rate of {result['learning_rate']:g}"
    kept = result["kept_step"]
    if rmse := [entry["eval_rmse"] for entry in result["log"] if entry["step"] == kept and "eval_rmse" in entry]:
        told += (
            f"; step {kept:,} is kept, with an rmse of {rmse[-1]:.3f} on {result['validation']:,} validation records"
        )
    return told
