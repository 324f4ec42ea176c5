"""The folder of a run: every file's name, what is done, and how a second call goes on."""

import logging
import os
import shutil
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, ContextManager, Iterable, Iterator, Mapping

from tract_lite.data.jsonl import read_json, read_rows, replacing, write_json, write_rows
from tract_lite.data.records import read_records, write_records
from tract_lite.data.resume import claim
from tract_lite.data.splits import Splits
from tract_lite.judgement import Judgement
from tract_lite.record import Record
from tract_lite.training.settings import COMPLETE_FILE, RESULT_FILE

logger = logging.getLogger(__name__)

SETTINGS, COUNTS, LOG, DONE = "settings.json", "counts.json", "log.txt", "done.json"
TRAINING, VALIDATION, HELD_OUT = "training.jsonl", "validation.jsonl", "held_out.jsonl"
SEED_REASONINGS, OWN_REASONINGS = "seed_reasonings.jsonl", "self_generated.jsonl"
STAGES = ("stage1", "stage2")
ADAPTER_GGUF, PARITY, METRICS, JUDGED = "adapter.gguf", "parity.json", "metrics.json", "judged"
REPORT, FIGURE, CARD = "report.md", "report.png", "README.md"
# Processes wait for what the first one writes.
WAIT = timedelta(days=7)


class Run:
    """A folder in which a run leaves its files, and goes on where an earlier call stopped.

    `run / name` is the path of a file. Where several processes run together, the first one writes
    and the others wait for it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._processes: Any = None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            import torch
            from accelerate import PartialState

            self._processes = PartialState(cpu=not torch.cuda.is_available(), timeout=WAIT)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self._processes is None or self._processes.is_main_process

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Go on in the folder, or make it this run's.
        Raises ValueError: it holds a run with other settings.
        """
        with self._first():
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.is_first and not read_json(self / DONE):
                # Nothing is made yet, so nothing is lost.
                (self / SETTINGS).unlink(missing_ok=True)
            claim(self / SETTINGS, settings)
        logger.info("run folder: %s", self.folder)

    def once(self, name: str, make: Callable[..., Any], *arguments: Any) -> Path:
        """The path of `name` in the folder, made by `make(*arguments, path)` unless it is done.

        What a stopped call has left of it stays there, for `make` to go on with or to replace. All
        processes call this.
        """
        path = self / name
        with self._first():
            done = read_json(self / DONE)
            if name not in done or not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                make(*arguments, path)
                write_json(self / DONE, {**done, name: True})
        return path

    def data(self, read: Callable[..., Splits], *arguments: Any, **options: Any) -> Splits:
        """What `read` gives, the same records at every call."""

        def keep(path: Path) -> None:
            splits = read(*arguments, **options)
            for file, records in zip((TRAINING, VALIDATION), (splits.training, splits.validation)):
                write_records(self / file, records)
            write_json(self / COUNTS, splits.counts)
            write_records(path, splits.held_out)

        self.once(HELD_OUT, keep)
        training, validation, held_out = map(self._records, (TRAINING, VALIDATION, HELD_OUT))
        return Splits(training, validation, held_out, self.counts)

    @property
    def counts(self) -> dict[str, Any]:
        """What was read, left out, kept and used, by step, from the files that are there."""
        counts = read_json(self / COUNTS)
        names = {"training_records": TRAINING, "validation_records": VALIDATION, "held_out_items": HELD_OUT}
        counts |= {key: len(read_rows(self / file)) for key, file in names.items() if (self / file).exists()}
        for file in (SEED_REASONINGS, OWN_REASONINGS):
            if (self / file).exists():
                reasons = Counter(row["reason"] for row in read_rows((self / file).with_suffix(".rejected.jsonl")))
                counts[Path(file).stem] = {"kept": len(read_rows(self / file)), "rejected": dict(reasons)}
        shown = ("records", "examples", "dropped", "validation", "kept_step")
        for name, stage in self.stages().items():
            counts[name] = {key: stage[key] for key in shown if key in stage}
        return counts

    def stages(self) -> dict[str, dict[str, Any]]:
        """What each finished stage says of itself."""
        found = {name: read_json(self / name / RESULT_FILE) for name in STAGES}
        return {name: stage for name, stage in found.items() if stage}

    def logs(self) -> dict[str, list[dict[str, float]]]:
        """What each stage logged, up to its last checkpoint where it is not finished."""
        logs = {}
        for name in STAGES:
            log = read_json(self / name / RESULT_FILE).get("log", [])
            for done in (self / name).glob(f"checkpoint-*/{COMPLETE_FILE}") if not log else ():
                state = read_json(done.with_name("trainer_state.json"))
                log = max(log, state.get("log_history", []), key=len)
            logs[name] = log
        return logs

    def keep(self, made: Path) -> Path:
        """A file that was made elsewhere, copied into the folder; it is there whole or not."""
        kept = self / made.name
        if made.resolve() != kept.resolve():
            with replacing(kept) as part:
                shutil.copyfile(made, part)
        return kept

    def keep_judged(self, name: str, judgements: Iterable[Judgement]) -> None:
        """Keep another judge's word on the held-out items, to be compared with those of the run."""
        path = self / JUDGED / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, (judgement.to_row() for judgement in judgements))

    def gguf_files(self) -> list[Path]:
        """The GGUF files of the judge."""
        return sorted(self.folder.glob("judge-*.gguf"))

    @contextmanager
    def log(self) -> Iterator[None]:
        """Everything that is logged goes to `log.txt` as well."""
        if not self.is_first:
            logging.getLogger().setLevel(logging.WARNING)
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(self / LOG, encoding="utf-8")
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()

    def _records(self, name: str) -> list[Record]:
        path = self / name
        return read_records(path) if path.stat().st_size else []

    def _first(self) -> ContextManager[Any]:
        """The first process runs what is inside; the others wait for it, and then find it done."""
        return self._processes.main_process_first() if self._processes else nullcontext()
