"""A judge's model card: what its run did, measured and left out, as the README.md of its folder."""

import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any, Mapping, NamedTuple

from jinja2 import Environment

from tract_lite.data.jsonl import read_json
from tract_lite.metrics import COLUMNS, WITH_INTERVAL, format_table
from tract_lite.rail import LOW_MASS
from tract_lite.report.verdict import is_toy
from tract_lite.report.words import EXAMPLE, STAGE_TITLES
from tract_lite.run import ADAPTER_GGUF, CARD, METRICS, SETTINGS, STAGES, Run
from tract_lite.spec import SPEC_FILE, JudgeSpec
from tract_lite.training.settings import ADAPTER
from tract_lite.version import __version__

DATA_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")


class _Named(NamedTuple):
    """What a card calls a model or data set, and whether that is its id on the hub."""

    name: str
    on_hub: bool


def write_model_card(run_dir: str | Path, folder: str | Path | None = None) -> Path:
    """Write `README.md`, from what a run folder holds, into `folder`: the run folder itself unless
    given, which is where the GGUF files stand, or that of the merged weights.

    It opens with the YAML header that model hubs read. What the run did not record is said to be
    unknown or left out. Of paths only the last part is shown. An older card is replaced.
    Raises ValueError: the run folder holds no judge spec.
    """
    run, folder = Run(run_dir), Path(run_dir if folder is None else folder)
    spec = _spec(run, folder)
    settings, metrics = read_json(run / SETTINGS), read_json(run / METRICS)
    gguf_files = sorted(path.name for path in folder.glob("*.gguf"))
    is_merged = (folder / "config.json").is_file()
    is_example = "data" in settings and not settings["data"]
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    template = files("tract_lite.report").joinpath("card.md.jinja").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        name=run.folder.resolve().name,
        version=__version__,
        spec=spec,
        seed_model=_shown(spec.base_model),
        data=_Named(EXAMPLE, False) if is_example else _shown(settings.get("data")),
        is_merged=is_merged,
        files=gguf_files,
        opened=_opened([name for name in gguf_files if name != ADAPTER_GGUF], is_merged),
        counts=run.counts,
        stages={STAGE_TITLES[name]: stage for name, stage in run.stages().items()},
        settings=settings,
        table=_table(metrics.get("rows", {})),
        parities=metrics.get("parity", {}),
        low_mass=LOW_MASS,
        is_toy=is_toy(settings),
        is_direct=spec.method.get("direct_share") == 1,
    )
    path = folder / CARD
    path.write_text(text, encoding="utf-8")
    return path


def _spec(run: Run, folder: Path) -> JudgeSpec:
    places = [run / stage / ADAPTER for stage in reversed(STAGES)] + [folder]
    found = next((place for place in places if (place / SPEC_FILE).is_file()), None)
    if found is None:
        raise ValueError(f"{run.folder} holds no {SPEC_FILE}: is it a run folder with a stage?")
    return JudgeSpec.load(found)


def _shown(name: str | None) -> _Named:
    """A hub id as it is; of a path only its last part, since the rest is private."""
    if not name:
        return _Named("unknown", False)
    is_file = Path(name).exists() or Path(name).suffix in DATA_SUFFIXES
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not is_file:
        return _Named(name, True)
    return _Named(Path(name).name, False)


def _opened(judges: list[str], is_merged: bool) -> str:
    """How the judge is opened in Python."""
    if judges:
        return f'Judge.from_gguf("{judges[-1]}")'
    if is_merged:
        return 'Judge.from_pretrained(".")'
    return f'Judge.from_gguf("seed.gguf", adapter="{ADAPTER_GGUF}")'


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures with their intervals; empty where there are none."""
    cells = {
        name: {"items": f"{row['count']:,}", **{column: _figure(row, column) for column in COLUMNS}}
        for name, row in rows.items()
    }
    return format_table(cells, ["items", *COLUMNS]) if cells else ""


def _figure(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if math.isnan(value):
        return "undefined"
    interval = row.get("intervals", {}).get(column)
    if column not in WITH_INTERVAL or not interval or any(map(math.isnan, interval)):
        return f"{value:.3f}"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
