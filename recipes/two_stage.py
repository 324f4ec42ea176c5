"""The whole way: judging data, stage 1, self-generated reasonings, stage 2, GGUF, judgement.

    python recipes/two_stage.py --preset demo
    python recipes/two_stage.py --data my_scores.csv --out runs/mine
    accelerate launch --multi_gpu recipes/two_stage.py --data my_scores.csv

A second call with the same --out goes on where the first one stopped. With several GPUs, all of
them train; the first one does the rest.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import logging
import shutil
import sys
from datetime import timedelta
from hashlib import file_digest
from pathlib import Path
from typing import Any, Sequence

import torch

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if torch.cuda.is_available() and importlib.util.find_spec("unsloth"):
    # Unsloth patches transformers, so it comes first; without CUDA it can't be imported at all.
    import unsloth  # noqa: F401

from accelerate import PartialState

import demo_task
from demo_seed import cached_seed
from held_out import HeldOut, sample_labels
from own_data import read_own_data
from presets import Options, parse, preset_for
from run_folder import RunFolder
from tract_lite import (
    Judge, JudgeSpec, Record, Sampling, ScoreScale, add_lora, export_adapter, export_gguf,
    generate_cots, load_seed, merge_adapter, read_records, split_records, train_stage,
)
from tract_lite.estimate import run_seconds
from tract_lite.jsonl import replacing, write_json, write_rows
from tract_lite.metrics import format_table
from tract_lite.model_card import write_model_card
from tract_lite.parity import Parity, compare
from tract_lite.prompt import DEFAULT_TEMPLATE, make_spec
from tract_lite.records import record_to_row
from tract_lite.report import write_report
from tract_lite.seed import load_adapter
from tract_lite.train import RESULT_FILE

logger = logging.getLogger("two_stage")

# As TRACT's; of fewer records, the best step would be found by chance.
VALIDATION_SHARE = 0.05
LEAST_VALIDATION = 20
# Held-out items that an export is checked with.
CHECKED = 8
# What a second call may choose anew.
MAY_CHANGE = ("scratch", "train_only")
# Processes wait for what the first one writes.
WAIT = timedelta(days=7)


class TwoStage:
    """One run and its folder; each step leaves a file by which a second call knows it is done."""

    def __init__(self, options: Options):
        self.options = options
        self.preset = preset_for(options)
        self.out = Path(options.out)
        self.merged = Path(options.scratch or options.out) / "merged"
        self.processes = PartialState(cpu=not torch.cuda.is_available(), timeout=WAIT)
        self.folder = RunFolder(self.out, self.processes.is_main_process)
        if not self.processes.is_main_process:
            logging.getLogger().setLevel(logging.WARNING)
        low, _, high = options.scale.partition("-")
        self.is_example = self.preset.data is None
        self.scale = ScoreScale.integers(int(low), int(high))
        self.spec_fields = {
            "scale": self.scale,
            "template": demo_task.TEMPLATE if self.is_example else DEFAULT_TEMPLATE,
            "max_length": self.preset.max_length,
            "sampling": Sampling(max_new_tokens=self.preset.max_new_tokens),
        }

    def run(self) -> None:
        """All steps in order."""
        processes, folder = self.processes, self.folder
        with folder.log():
            # What the first process has written, the others find done.
            with processes.main_process_first():
                folder.open(self._settings())
                training, held_out = self._data()
                self.seed_model = self.preset.seed_model or str(self._toy_seed(training))
                training = self._with_reasonings(training)
            self._stage("stage1", training)
            with processes.main_process_first():
                training = self._reasonings("self_generated", self.out / "stage1/adapter", training)
            self._stage("stage2", training)
            if processes.is_main_process and not self.options.train_only:
                self._report(self._judge(held_out, self._export(held_out)))

    def _settings(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.options) | dataclasses.asdict(self.preset)
        if self.preset.data and Path(self.preset.data).is_file():
            with open(self.preset.data, "rb") as file:
                settings["data_sha256"] = file_digest(file, "sha256").hexdigest()
        return {name: value for name, value in settings.items() if name not in MAY_CHANGE}

    def _data(self) -> tuple[list[Record], list[Record]]:
        """The training pairs and the held-out items, the same ones at a second call."""
        training_file, held_out_file = self.out / "training.jsonl", self.out / "held_out.jsonl"
        if not held_out_file.exists():
            training, held_out = self._read_data()
            self.folder.keep_settings()
            write_rows(training_file, map(record_to_row, training))
            write_rows(held_out_file, map(record_to_row, held_out))
        training, held_out = read_records(training_file), read_records(held_out_file)
        self.validation = self._choose_validation(training)
        self.folder.count(training_records=len(training), held_out_items=len(held_out))
        return training, held_out

    def _choose_validation(self, training: Sequence[Record]) -> set[str]:
        """The keys of the records that each stage is validated on, and not trained on."""
        share = min(VALIDATION_SHARE, self.preset.validation / len(training))
        _, chosen = split_records(training, share)
        return {record.key for record in chosen} if len(chosen) >= LEAST_VALIDATION else set()

    def _read_data(self) -> tuple[list[Record], list[Record]]:
        if self.is_example:
            training = demo_task.make_items(self.preset.max_items, demo_task.TRAINING_SEED)
            held_out = demo_task.make_items(self.preset.held_out, demo_task.HELD_OUT_SEED)
            return [item.record for item in training], [item.record for item in held_out]
        training, held_out, counts = read_own_data(
            self.preset.data, self.options.split, self.scale,
            self.options.skip_bad, self.preset.max_items, self.preset.held_out,
        )
        self.folder.count(**counts)
        return training, held_out

    def _toy_seed(self, training: Sequence[Record]) -> Path:
        if self.is_example:
            return cached_seed(demo_task.pretraining_records(), self.spec_fields,
                               vocabulary_size=800, steps=500)
        logger.warning("no --seed-model: a toy seed is trained on the text of the data, to show "
                       "the way; for a judge of use, choose a real one")
        answered = [dataclasses.replace(record, feedback=record.feedback or record.response)
                    for record in training]
        return cached_seed(answered, self.spec_fields, vocabulary_size=4000, steps=100)

    def _load(self, adapter: Path | None = None) -> tuple[Any, Any, JudgeSpec]:
        gc.collect()
        torch.cuda.empty_cache()
        model, tokenizer = load_seed(self.seed_model, max_seq_length=self.preset.max_length,
                                     precision=self.options.precision)
        method = dataclasses.asdict(self.preset.training)
        # Unsloth may have loaded its own 4-bit copy of the seed; that is the adapter's base.
        spec = make_spec(tokenizer, base_model=model.config._name_or_path, method=method,
                         **self.spec_fields)
        return (load_adapter(model, adapter) if adapter else model), tokenizer, spec

    def _judge_from(self, adapter: Path | None) -> Judge:
        return Judge.from_model(*self._load(adapter), batch_size=self.preset.batch_size)

    def _with_reasonings(self, training: list[Record]) -> list[Record]:
        """Where annotators gave no reasoning, the seed writes one."""
        lacking = [record for record in training if not record.feedback]
        if not lacking:
            return training
        logger.info("%d of %d training records have a score and no reasoning: the seed writes one",
                    len(lacking), len(training))
        written = self._reasonings("seed_reasonings", None, lacking)
        return [record for record in training if record.feedback] + written

    def _reasonings(self, name: str, adapter: Path | None,
                    records: Sequence[Record]) -> list[Record]:
        """The records with a reasoning of the seed's own or, with an adapter, of its judge."""
        path = self.out / f"{name}.jsonl"
        if name not in self.folder.counts:
            logger.info("%s: writing a reasoning for each of %d records", name, len(records))
            kept, rejected = generate_cots(self._judge_from(adapter), records, path)
            self.folder.count(**{name: {"kept": len(kept), "rejected": dict(rejected)}})
        return read_records(path)

    def _stage(self, name: str, training: list[Record]) -> None:
        folder = self.out / name
        if not (folder / RESULT_FILE).exists():
            validation = [record for record in training if record.key in self.validation]
            training = [record for record in training if record.key not in self.validation]
            logger.info("%s: training on %d records, validating on %d", name, len(training),
                        len(validation))
            model, tokenizer, spec = self._load()
            model = add_lora(model, gradient_checkpointing=self.preset.gradient_checkpointing)
            if name == "stage1":
                self._estimate(model, tokenizer, training, spec)
            train_stage(model, tokenizer, training, spec, folder, self.preset.training,
                        validation=validation)
        if name not in self.folder.counts:
            result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
            self.folder.count(**{name: {key: result[key] for key in (
                "records", "examples", "dropped", "validation", "kept_step")}})

    def _estimate(self, model: Any, tokenizer: Any, training: Sequence[Record],
                  spec: JudgeSpec) -> None:
        seconds = run_seconds(model, tokenizer, training, spec, self.preset.training,
                              self.preset.batch_size)
        stage, reasonings = seconds["stage"] / 60, seconds["reasonings"] / 60
        logger.info("this run takes about %.1f minutes: %.1f for each stage, %.1f for the "
                    "reasonings between them; export and evaluation come on top",
                    2 * stage + reasonings, stage, reasonings)

    def _export(self, held_out: Sequence[Record]) -> list[Path]:
        """The adapter alone, then the merged judge in each type; checked on some held-out items."""
        adapter = self.out / "stage2" / "adapter"
        seed, scratch = JudgeSpec.load(adapter).base_model, self.merged.parent
        if not (self.out / "adapter.gguf").exists():
            self._keep(export_adapter(adapter, seed, scratch / "adapter.gguf"))
        names = self.preset.quantization
        files = [self.out / f"judge-{name}.gguf" for name in names]
        if missing := [name for name, file in zip(names, files) if not file.exists()]:
            # A merge that is there may be older than the adapter.
            merge_adapter(seed, adapter, self.merged, base=self.options.base)
            logger.info("exporting %s", ", ".join(missing))
            for made in export_gguf(self.merged, scratch / "judge.gguf", missing,
                                    records=held_out[:CHECKED]):
                self._keep(made)
        return files

    def _keep(self, made: Path) -> None:
        """Copy a file from the scratch folder into the run's."""
        kept = self.out / made.name
        if not kept.exists():
            with replacing(kept) as part:
                shutil.copyfile(made, part)

    def _exported(self, file: Path, parallel: int | None) -> Judge:
        # The run's folder may be on a drive that is slow to read from.
        near = self.merged.parent / file.name
        return Judge.from_gguf(near if near.exists() else file, parallel=parallel)

    def _judge(self, held_out: Sequence[Record], files: Sequence[Path]) -> dict[str, Any]:
        path = self.out / "metrics.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        items, rows, parity = HeldOut(held_out, self.out / "judged"), {}, {}
        if self.is_example:
            made = demo_task.make_items(self.preset.held_out, demo_task.HELD_OUT_SEED)
            rows["true mean (best possible)"] = items.evaluate([item.mean for item in made])
        judged = items.judge("stage1", lambda: self._judge_from(self.out / "stage1/adapter"))
        rows["stage 1, CoT-RAIL"] = items.evaluate([j.score for j in judged])
        judged = items.judge("stage2", lambda: self._judge_from(self.out / "stage2/adapter"))
        rows["stage 2, sampled label"] = items.evaluate(sample_labels(judged, self.scale))
        rows |= items.readings("stage 2", judged)
        for file in files:
            judged = items.judge(
                file.stem, lambda: self._exported(file, self.preset.gguf_parallel),
                self.preset.gguf_items)
            rows |= items.readings(file.name, judged)
            with self._exported(file, 1) as judge, self._trained_judge() as trained:
                try:
                    parity[file.name] = dataclasses.asdict(
                        compare(judge, trained, items.records, judged))
                except ValueError as error:
                    logger.warning("%s: no parity: %s", file.name, error)
        metrics = {"rows": rows, "parity": parity, "counts": self.folder.counts}
        write_json(path, metrics)
        return metrics

    def _trained_judge(self) -> Judge:
        # On a GPU the merged weights in 16 bits may not fit where the 4-bit ones do.
        if torch.cuda.is_available() or not self.merged.exists():
            return self._judge_from(self.out / "stage2/adapter")
        return Judge.from_pretrained(self.merged, batch_size=self.preset.batch_size)

    def _report(self, metrics: dict[str, Any]) -> None:
        print(f"\n{format_table(metrics['rows'])}\n")
        for name, figures in metrics["parity"].items():
            print(f"{name} against transformers, {Parity(**figures)}")
        for folder in filter(Path.is_dir, (self.out, self.merged)):
            write_model_card(self.out, folder)
        judge = self.out / f"judge-{self.preset.quantization[-1]}.gguf"
        print(f"\njudge:  {judge}\nreport: {write_report(self.out)}\nall:    {self.out}/")


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(arguments)
    try:
        TwoStage(options).run()
    except (ValueError, FileNotFoundError) as error:
        logger.error("error: %s", error)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        logger.error("stopped; the same command goes on")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
