"""What more than one test file asks for."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Callable, Iterator

import pytest
from filelock import FileLock

WORKER = os.environ.get("PYTEST_XDIST_WORKER")

if WORKER and hasattr(os, "sched_setaffinity"):
    # Each worker has a core of its own, and so has what it starts: threads beyond that only wait.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(WORKER.removeprefix("gw")) % len(cores)]})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest runs first, so that no worker waits for them at the end.

    Vocabularies of real models are large, and come on top: a quick answer does without them.
    """
    from tiny import REAL

    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(value in REAL for value in values if isinstance(value, str)):
            item.add_marker(pytest.mark.export)
    items.sort(key=lambda item: "demo_run" not in item.fixturenames)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> pytest.TestReport:
    """With REQUIRE_ALL=1, a test that is skipped has failed."""
    report = yield
    if report.skipped and os.environ.get("REQUIRE_ALL") == "1" and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped, and REQUIRE_ALL is set: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def quiet_again() -> Iterator[None]:
    """What a verb of the command line tells of its work is not told by the tests after it."""
    yield
    logging.getLogger("tract_lite").setLevel(logging.NOTSET)


@pytest.fixture
def float32_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without units for bfloat16, so that scores hold to many digits."""
    from tract_lite.training import precision

    monkeypatch.setattr(precision, "has_bfloat16_units", lambda: False)


@pytest.fixture(scope="session")
def shared_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`shared_once(name, make)`: a folder that `make(folder)` has filled, once for all workers.

    Tests leave it as it is.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if WORKER else base

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder = base / "shared" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            if not folder.exists():
                unfinished = folder.with_name(f"{name}.part")
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return once


def _run(shared_once: Callable[..., Path], preset: str) -> Path:
    import two_stage

    return shared_once(preset, lambda out: two_stage.main(["--preset", preset, "--out", str(out)]))


@pytest.fixture(scope="session")
def demo_run(shared_once: Callable[..., Path]) -> Path:
    """The run folder of the demo, which takes minutes: for what is said of its figures."""
    return _run(shared_once, "demo")


@pytest.fixture(scope="session")
def quick_run(shared_once: Callable[..., Path]) -> Path:
    """The run folder of the preset `quick`: a whole run with a poor judge."""
    return _run(shared_once, "quick")
