"""What more than one test file asks for."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the demo, which takes minutes; leave it as it is."""
    import two_stage

    out = tmp_path_factory.mktemp("demo")
    two_stage.main(["--preset", "demo", "--out", str(out)])
    return out
