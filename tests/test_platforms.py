"""Other machines than the one it was written on: names, letters and functions that they lack."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest
from stages import small_seed_model

ROOT = Path(__file__).parents[1]
# What Windows lacks: whole modules for our own code, and functions for every code.
WITHOUT_UNIX = """
import builtins, os, pkgutil
import torch, transformers, peft, accelerate, datasets
real, unix = builtins.__import__, {"resource", "fcntl", "pwd", "grp", "termios", "posix", "pty", "syslog"}
OWN = ("tract_lite", "two_stage", "prepare", "example", "evidence", "evidence_page", "evidence_tasks", "install",
       "notebooks", "pictures")

def import_as_on_windows(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    if not level and name.partition(".")[0] in unix and importer in OWN:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = import_as_on_windows
for name in ("sched_getaffinity", "sched_setaffinity", "fork", "getuid", "geteuid", "getpgid", "killpg", "setsid",
             "mkfifo", "sysconf", "uname"):
    delattr(os, name)
import tract_lite
for module in pkgutil.walk_packages(tract_lite.__path__, "tract_lite."):
    __import__(module.name)
for name in OWN[1:]:
    __import__(name)
"""
STEPS = """
import logging, sys
from pathlib import Path
from tract_lite import (Judge, Record, Run, ScoreScale, TrainSettings, errors_in_words, merge_adapter, read_splits,
                        train_adapter)

place = Path(sys.argv[1])
scale = ScoreScale.integers(1, 5)
logging.basicConfig(level=logging.INFO, format="%(message)s")
with errors_in_words():
    run = Run(place / "run")
    with run.log():
        run.begin({"preset": "quick"})
        sizes = {"max_items": 8, "max_held_out": 2, "max_validation": 0}
        data = run.data(read_splits, data=str(place / "scores.csv"), held_out=None, scale=scale, **sizes)
        seed = {"seed_model": str(place / "seed model"), "scale": scale, "template": "{{ response }}"}
        settings = TrainSettings(batch_size=4, micro_batch_size=4, max_steps=1)
        adapter = train_adapter(data.training, run / "stage1", settings=settings, load_in_4bit=False, **seed)
        merged = merge_adapter(seed["seed_model"], adapter, run / "merged")
        with Judge.from_pretrained(merged) as judge:
            judgement = next(judge.score_many([Record(response="Gr\\u00fc\\u00dfe")]))
        logging.info("Gr\\u00fc\\u00dfe: %s", judgement.error)
        print("Gr\\u00fc\\u00dfe", judgement.score)
"""


@pytest.mark.training
@pytest.mark.parametrize(
    "folder, prelude, environment",
    [
        ("as on Windows", WITHOUT_UNIX, {}),
        ("Öfen und Töpfe", "", {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}),
        ("with blanks", "", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}),
    ],
)
def test_a_judge_is_trained_merged_and_asked_where_less_is_there(
    folder: str, prelude: str, environment: dict[str, str], tmp_path: Path, shared_once: Callable[..., Path]
) -> None:
    place = tmp_path / folder
    place.mkdir()
    (place / "seed model").symlink_to(small_seed_model(shared_once))
    rows = "".join(f"Grüße {n},{n % 5 + 1},Ganz nett für {n}.\n" for n in range(12))
    (place / "scores.csv").write_text(f"response,score,feedback\n{rows}", encoding="utf-8")
    # The hub's cache can't be written, even by the administrator.
    (place / "hub").write_text("no folder")
    places = {"HF_HOME": str(place / "hub"), "TRACT_LITE_CACHE": str(place / "cache")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "recipes")])
    done = subprocess.run(
        [sys.executable, "-c", prelude + STEPS, str(place)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **places, **environment},
        capture_output=True,
    )
    shown = done.stderr.decode("utf-8", "replace")
    assert done.returncode == 0, shown[-3000:]
    assert "Logging error" not in shown and "Traceback" not in shown
    assert done.stdout.startswith(b"Gr??e " if environment else "Grüße ".encode())
    assert " Grüße: None\n" in (place / "run" / "log.txt").read_text(encoding="utf-8")
