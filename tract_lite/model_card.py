"""A judge's model card: what its run did, measured and left out, as the README.md of its folder."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

from tract_lite import __version__
from tract_lite.metrics import COLUMNS, WITH_INTERVAL
from tract_lite.rail import LOW_MASS
from tract_lite.spec import SPEC_FILE, JudgeSpec

CARD_FILE = "README.md"
STAGES = {"stage1": "stage 1", "stage2": "stage 2"}
EXAMPLE = "the built-in example of tract-lite: made-up advice, for showing the method"
DATA_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
UNKNOWN, TO_FILL = "unknown", "*fill in*"


def write_model_card(run_dir: str | Path, folder: str | Path | None = None) -> Path:
    """Write `README.md`, from what a run folder holds, into `folder`: the run folder itself unless
    given, which is where the GGUF files stand, or that of the merged weights.

    It opens with the YAML header that model hubs read. What the run did not record is said to be
    unknown or left out. Of paths only the last part is shown. An older card is replaced.

    Raises:
        ValueError: the run folder holds no judge spec.
    """
    run_dir = Path(run_dir)
    folder = run_dir if folder is None else Path(folder)
    run = _Run(run_dir, folder)
    path = folder / CARD_FILE
    path.write_text("\n".join([*_header(run), "", *_body(run)]) + "\n", encoding="utf-8")
    return path


class _Run:
    """What a run folder holds; an empty part where it holds nothing."""

    def __init__(self, run_dir: Path, folder: Path):
        places = [run_dir / "stage2" / "adapter", run_dir / "stage1" / "adapter", folder]
        found = next((place for place in places if (place / SPEC_FILE).is_file()), None)
        if found is None:
            raise ValueError(f"{run_dir} holds no {SPEC_FILE}: is it a run folder with a stage?")
        self.spec = JudgeSpec.load(found)
        self.settings = _read(run_dir / "settings.json")
        self.counts = _read(run_dir / "counts.json")
        self.metrics = _read(run_dir / "metrics.json")
        self.stages = {title: stage for name, title in STAGES.items()
                       if (stage := _read(run_dir / name / "stage.json"))}
        self.is_merged = (folder / "config.json").is_file()
        self.files = sorted(path.name for path in folder.glob("*.gguf"))
        self.name = run_dir.resolve().name
        self.seed, self.seed_on_hub = _shown(self.spec.base_model)

    @property
    def data(self) -> tuple[str, bool]:
        """The name of the training data, and whether it is a hub id."""
        if "data" not in self.settings:
            return UNKNOWN, False
        return _shown(self.settings["data"]) if self.settings["data"] else (EXAMPLE, False)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _shown(name: str) -> tuple[str, bool]:
    """A hub id as it is, with True; of a path only its last part, since the rest is private."""
    if not name:
        return UNKNOWN, False
    is_file = Path(name).exists() or Path(name).suffix in DATA_SUFFIXES
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not is_file:
        return name, True
    return Path(name).name, False


def _header(run: _Run) -> list[str]:
    lines = ["---", "license:  # fill in; see the section Licence"]
    if run.seed_on_hub:
        lines.append(f"base_model: {run.seed}")
    if run.data[1]:
        lines += ["datasets:", f"- {run.data[0]}"]
    lines += [f"library_name: {'transformers' if run.is_merged else 'gguf'}",
              "pipeline_tag: text-generation", "tags:", "- tract-lite", "- llm-as-a-judge"]
    return [*lines, "---"]


def _body(run: _Run) -> Iterator[str]:
    labels = ", ".join(label if label == f"{value:g}" else f"{label} = {value:g}" for label, value
                       in zip(run.spec.scale.labels, run.spec.scale.values))
    yield from [
        f"# {run.name}", "",
        f"A judge of text: it writes a reasoning, then its score is the expectation over its own "
        f"probabilities of the labels {labels}. Trained from {run.seed} with tract-lite "
        f"{__version__}, by the method of [TRACT](https://aclanthology.org/2025.acl-long.147/).",
    ]
    if run.files:
        yield from ["", "Files: " + ", ".join(f"`{name}`" for name in run.files) + "."]
    parts = {"Use": _use(run), "Data": _data(run), "Settings": _settings(run),
             "Metrics": _metrics(run), "Limits": _limits(run), "Licence": _licence(run)}
    for title, lines in parts.items():
        yield from ["", f"## {title}", "", *lines]


def _use(run: _Run) -> list[str]:
    judges = [name for name in run.files if name != "adapter.gguf"]
    opened = (f'Judge.from_gguf("{judges[-1]}")' if judges else 'Judge.from_pretrained(".")'
              if run.is_merged else 'Judge.from_gguf("seed.gguf", adapter="adapter.gguf")')
    return ["The prompt, the scale and the score tokens are inside.", "", "```python",
            "from tract_lite import Judge, Record, Rubric", "", f"judge = {opened}",
            'record = Record(instruction="...", response="...", rubric=Rubric("..."))',
            "print(judge.score(record).explain())", "```"]


def _data(run: _Run) -> list[str]:
    counts = {key: value for key, value in run.counts.items() if isinstance(value, int)}
    lines = [f"- source: {run.data[0]}"]
    lines += [f"- {key.replace('_', ' ')}: {value:,}" for key, value in counts.items()]
    for name in ("seed_reasonings", "self_generated"):
        if written := run.counts.get(name):
            rejected = sum(written["rejected"].values())
            lines.append(f"- {name.replace('_', ' ')}: {written['kept']:,} kept, "
                         f"{rejected:,} rejected")
    for title, stage in run.stages.items():
        dropped = sum(stage["dropped"].values())
        lines.append(f"- {title}: {stage['examples']:,} sequences trained on, {dropped:,} dropped, "
                     f"{stage.get('validation', 0):,} for validation")
    return lines


def _settings(run: _Run) -> list[str]:
    """The settings of the training, of the merge, and of the judging."""
    shown = {name: run.settings[name] for name in ("preset", "base", "precision")
             if run.settings.get(name)}
    for title, stage in run.stages.items():
        kept = {} if "kept_step" not in stage else {"kept step": stage["kept_step"]}
        settings = {**stage["settings"], "learning_rate": stage["learning_rate"], **kept}
        shown[title] = ", ".join(f"{key} {value}" for key, value in settings.items())
    sampling = run.spec.sampling
    shown["sampling of a reasoning"] = (
        f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, repetition penalty "
        f"{sampling.repetition_penalty:g}, {sampling.max_new_tokens:,} tokens at most")
    shown["prompt, reasoning and score"] = f"{run.spec.max_length:,} tokens at most"
    return [f"- {name}: {value}" for name, value in shown.items()]


def _metrics(run: _Run) -> list[str]:
    rows = run.metrics.get("rows")
    if not rows:
        return ["None were recorded."]
    lines = ["Agreement with the gold scores of held-out items from the same source, one reasoning "
             "per item; in brackets, 95 % intervals over the items.", "",
             *_table(["reading", "items", *COLUMNS], [
                 [name, f"{row['count']:,}", *(_figure(row, column) for column in COLUMNS)]
                 for name, row in rows.items()])]
    for name, parity in run.metrics.get("parity", {}).items():
        lines += ["", f"`{name}` against transformers, after the same reasonings: scores of "
                  f"{parity['records']:,} items differ by {parity['mean_difference']:.4f} on "
                  f"average, {parity['largest_difference']:.4f} at most; "
                  f"{parity['different_prompts']:,} prompts have other tokens."]
    return lines


def _figure(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if math.isnan(value):
        return "undefined"
    interval = row.get("intervals", {}).get(column)
    if column not in WITH_INTERVAL or not interval or any(map(math.isnan, interval)):
        return f"{value:.3f}"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def _limits(run: _Run) -> list[str]:
    values = run.spec.scale.values
    lines = [
        f"- It knows scores from {min(values):g} to {max(values):g} and criteria like those of its "
        "data; other criteria, languages and longer texts were not measured.",
        "- It learnt the judgements in its data, with their errors and preferences.",
        f"- A judgement with a `mass` below {LOW_MASS:g} was pulled down: the model was not about "
        "to write a score.",
        "- Reasonings are sampled: another seed gives another reasoning and another score. `std` "
        "tells how far to trust one.",
    ]
    if run.metrics.get("rows"):
        lines.append("- The metrics are those of one run.")
    if not run.settings.get("seed_model", True):
        lines.append("- Its seed model is a toy, made for showing the way.")
    if not run.settings.get("data", True):
        lines.append("- Its data are an example: it is a judge for trying things out.")
    return lines


def _licence(run: _Run) -> list[str]:
    fields = {"this judge": TO_FILL, f"the seed model ({run.seed})": TO_FILL,
              f"the training data ({run.data[0]})": TO_FILL,
              "terms of the model that wrote the data's scores or reasonings, if one did": TO_FILL}
    return [f"- {name}: {value}" for name, value in fields.items()]
