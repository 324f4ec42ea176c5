"""The folder of a run: its settings, its counts and its log."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from tract_lite.jsonl import write_json

logger = logging.getLogger("two_stage")


class RunFolder:
    """`writes`: whether this process is the one that keeps counts and log."""

    def __init__(self, path: Path, writes: bool):
        self.path, self._writes = path, writes

    def open(self, settings: dict[str, Any]) -> None:
        """Go on in the folder, if it holds this run already.

        Raises:
            ValueError: it holds a run with other settings.
        """
        file, self._settings = self.path / "settings.json", json.loads(json.dumps(settings))
        if file.exists():
            there = json.loads(file.read_text(encoding="utf-8"))
            other = ", ".join(f"{name}: {there.get(name)} there, {self._settings.get(name)} now"
                              for name in sorted(there.keys() | self._settings.keys())
                              if there.get(name) != self._settings.get(name))
            if other:
                raise ValueError(f"{self.path} holds a run with other settings ({other}): choose "
                                 "another --out")
        logger.info("run folder %s, preset %s", self.path, settings["preset"])

    def keep_settings(self) -> None:
        """From now on the folder belongs to a run with these settings."""
        write_json(self.path / "settings.json", self._settings)

    @property
    def counts(self) -> dict[str, Any]:
        """What was read, dropped and used, by step."""
        file = self.path / "counts.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def count(self, **counts: Any) -> None:
        """Keep counts for the log, the report and a second call."""
        if self._writes:
            write_json(self.path / "counts.json", self.counts | counts)
            logger.info("%s", json.dumps(counts))

    @contextmanager
    def log(self) -> Iterator[None]:
        """Everything that is logged goes to `log.txt` as well."""
        if not self._writes:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(self.path / "log.txt")
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()
