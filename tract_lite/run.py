"""The folder of a run: every file's name, what is done, and how a second call goes on."""

import json
import logging
import os
import shutil
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, ContextManager, Iterable, Iterator, Mapping

from tract_lite.data.columns import Columns
from tract_lite.data.formats import to_record
from tract_lite.data.jsonl import read_json, read_rows, replacing, write_json, write_rows
from tract_lite.data.records import write_records
from tract_lite.data.resume import claim
from tract_lite.data.splits import Splits
from tract_lite.judgement import Judgement
from tract_lite.record import Record
from tract_lite.training.quiet import quiet_console
from tract_lite.training.settings import COMPLETE_FILE, RESULT_FILE

logger = logging.getLogger(__name__)

SETTINGS, COUNTS, LOG, DONE = "settings.json", "counts.json", "log.txt", "done.json"
TRAINING, VALIDATION, HELD_OUT = "training.jsonl", "validation.jsonl", "held_out.jsonl"
SEED_REASONINGS, OWN_REASONINGS = "seed_reasonings.jsonl", "self_generated.jsonl"
# Those of the method, or the one on scores alone.
STAGES = ("stage1", "stage2", "direct")
ADAPTER_GGUF, PARITY, METRICS, JUDGED = "adapter.gguf", "parity.json", "metrics.json", "judged"
PAGE, REPORT, FIGURE, CARD = "report.html", "report.md", "report.png", "README.md"
# Settings that change nothing of what is trained: what is computed at once, and what comes later.
LATER = (
    *("parallel", "micro_batch_size", "gradient_checkpointing", "offline"),
    *("base", "quantization", "gguf_items", "gguf_parallel"),
)
# Processes wait for what the first one writes.
WAIT = timedelta(days=7)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: where the disk is full, the run ends by what else it can't write."""


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

        Settings bind it once a model was trained here, or has written something; `LATER` ones
        never do, and what was measured by others is measured anew.
        Raises ValueError: it can't be made, or holds a run with other settings or GGUF files of
            another `base`.
        """
        bound = {name: value for name, value in settings.items() if name not in LATER}
        with self._first():
            self._make_folder()
            try:
                claim(self / SETTINGS, bound)
            except ValueError:
                if self._has_work():
                    raise
                (self / SETTINGS).unlink()
                (self / DONE).unlink(missing_ok=True)
                shutil.rmtree(self / JUDGED, ignore_errors=True)
                claim(self / SETTINGS, bound)
            if self.is_first:
                self._take_later({name: settings[name] for name in LATER if name in settings})
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
        training, validation, held_out = map(self.records, (TRAINING, VALIDATION, HELD_OUT))
        return Splits(training, validation, held_out, self.counts)

    def records(self, name: str) -> list[Record]:
        """The records of a file that the run has written; none where there is no file."""
        columns = Columns()
        return [to_record(row, columns) for row in read_rows(self / name)]

    @property
    def counts(self) -> dict[str, Any]:
        """What was read, left out, kept and used, by step, from the files that are there."""
        counts = read_json(self / COUNTS)
        names = {"training_records": TRAINING, "validation_records": VALIDATION, "held_out_items": HELD_OUT}
        counts |= {key: len(read_rows(self / file)) for key, file in names.items() if (self / file).exists()}
        for file in (SEED_REASONINGS, OWN_REASONINGS):
            if (self / file).exists():
                kept, rejected = read_rows(self / file), read_rows((self / file).with_suffix(".rejected.jsonl"))
                reasonings = {"kept": len(kept), "shortened": sum(row.get("shortened", False) for row in kept)}
                counts[Path(file).stem] = reasonings | {"rejected": dict(Counter(row["reason"] for row in rejected))}
        shown = ("records", "examples", "direct", "dropped", "validation", "kept_step")
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
        """Everything that is logged goes to `log.txt` with its time, and so does the traceback of
        an error; a console shows it above the bars, and no details."""
        if not self.is_first:
            logging.getLogger().setLevel(logging.WARNING)
            yield
            return
        self._make_folder()
        handler = _LogFile(self / LOG, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        with quiet_console():
            logging.getLogger().addHandler(handler)
            try:
                yield
            except Exception:
                # For whom the few words on the console are too few.
                handler.handle(logging.makeLogRecord({"msg": "stopped by an error", "exc_info": sys.exc_info()}))
                raise
            except KeyboardInterrupt:
                handler.handle(logging.makeLogRecord({"msg": "stopped"}))
                raise
            finally:
                logging.getLogger().removeHandler(handler)
                handler.close()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fault = f"the run folder {self.folder} can't be made ({error.strerror})"
            raise ValueError(f"{fault}: name another with --out") from error

    def _has_work(self) -> bool:
        """Whether a model was trained here, or has written something."""
        paths = [self / name for name in (SEED_REASONINGS, OWN_REASONINGS)]
        paths += [path.with_suffix(".rejected.jsonl") for path in paths]
        for stage in (self / name for name in STAGES):
            paths += [stage / RESULT_FILE, *stage.glob(f"checkpoint-*/{COMPLETE_FILE}")]
        return any(path.exists() and path.stat().st_size for path in paths)

    def _take_later(self, later: Mapping[str, Any]) -> None:
        """Take the settings that may change. Raises ValueError: older ones made a file."""
        before, base = read_json(self / SETTINGS), later.get("base")
        if before.get("base", base) != base and (files := self.gguf_files()):
            names = ", ".join(file.name for file in files)
            advice = f"delete them, to have them made with the base {base}, or choose another output"
            raise ValueError(f"{self.folder} has {names}, made with the base {before['base']}: {advice}")
        # Judgements of a file that is gone are none of the one that takes its place.
        gone = [path for path in (self / JUDGED).glob("judge-*.gguf.jsonl") if not (self / path.stem).exists()]
        for path in gone:
            path.unlink()
        measured = read_json(self / PARITY)
        if lost := [name for name in measured if not (self / name).exists()]:
            write_json(self / PARITY, {name: figures for name, figures in measured.items() if name not in lost})
            gone += [self / name for name in lost]
        after = {**before, **json.loads(json.dumps(later))}
        if after != before:
            write_json(self / SETTINGS, after)
        if after != before or gone:
            (self / METRICS).unlink(missing_ok=True)

    def _first(self) -> ContextManager[Any]:
        """The first process runs what is inside; the others wait for it, and then find it done."""
        return self._processes.main_process_first() if self._processes else nullcontext()
