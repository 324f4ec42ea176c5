"""What a run was made from and how, in sentences, from what its folder holds."""

from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

from tract_lite.report.verdict import is_toy

EXAMPLE = "the built-in example of tract-lite: made-up advice, for showing the method"
PLACES = ("data", "held_out", "rubric", "template", "seed_model")
STAGE_TITLES = {"stage1": "stage 1", "stage2": "stage 2", "direct": "the one stage"}
BITS = {"q8_0": "8 bits", "q4_k_m": "about 5 bits", "f16": "16 bits", "bf16": "16 bits"}


def settings_in_words(
    settings: Mapping[str, Any],
    counts: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Any]],
    seed_model: str | None = None,
) -> list[str]:
    """A sentence for each thing that a reader asks of a run; what nobody recorded is left out.

    `seed_model`: its name or folder, where the settings name a kind of one.
    """
    return [*_made_from(settings, counts, seed_model), *_trained(settings, stages), *_judged(settings)]


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with names of files and folders, and not where they lie, which is private."""
    return {name: _last_part(value) if name in PLACES and value else value for name, value in settings.items()}


def times_of(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """The seconds that the training of each finished stage took, without what lay between calls."""
    return {
        STAGE_TITLES.get(name, name): float(log[-1]["seconds"])
        for name, log in logs.items()
        if log and "train_runtime" in log[-1] and "seconds" in log[-1]
    }


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _made_from(settings: Mapping[str, Any], counts: Mapping[str, Any], seed_model: str | None) -> Iterator[str]:
    if settings:
        toy = "a toy, made for the data" if is_toy(settings) else _last_part(seed_model or settings.get("seed_model"))
        yield f"Seed model: {toy}."
        data = EXAMPLE if "data" in settings and not settings["data"] else _last_part(settings.get("data"))
        yield f"Data: {data}."
    if held_out := settings.get("held_out"):
        yield f"Held-out items: {_last_part(held_out)}."
    parts = [
        f"{counts[key]:,} {words}"
        for key, words in (
            ("items", "items read"),
            ("training_records", "records trained on"),
            ("validation_records", "for choosing the best step"),
            ("held_out_items", "held out, to measure with"),
        )
        if counts.get(key)
    ]
    if parts:
        yield f"Of these: {', '.join(parts)}."
    scale = counts.get("scale") or settings.get("scale")
    if scale:
        remap = f", written as {settings['remap']}" if settings.get("remap") else ""
        proposed = ", as the data propose" if counts.get("scale") else ""
        yield f"Scale: {scale if isinstance(scale, str) else ', '.join(scale)}{proposed}{remap}."


def _trained(settings: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, stage in stages.items():
        how, title = stage.get("settings", {}), STAGE_TITLES.get(name, name).capitalize()
        parts = [f"{stage['examples']:,} sequences"] if "examples" in stage else []
        if how.get("epochs"):
            parts.append(f"{how['epochs']:g} {'epoch' if how['epochs'] == 1 else 'epochs'}")
        if how.get("batch_size"):
            parts.append(f"batches of {how['batch_size']}")
        if stage.get("learning_rate"):
            parts.append(f"learning rate {stage['learning_rate']:g}")
        if how.get("direct_share"):
            parts.append(f"{how['direct_share']:.0%} of them without a reasoning")
        if "kept_step" in stage:
            parts.append(f"step {stage['kept_step']:,} kept")
        yield f"{title}: {', '.join(parts)}."
    if settings.get("max_length"):
        limit = f", of which a reasoning {settings['max_new_tokens']:,}" if settings.get("max_new_tokens") else ""
        yield f"Prompt, reasoning and score: {settings['max_length']:,} tokens at most{limit}."


def _judged(settings: Mapping[str, Any]) -> Iterator[str]:
    if names := settings.get("quantization"):
        yield f"Files: {', '.join(f'{n} ({BITS[n]} a weight)' if n in BITS else n for n in names)}."


def _last_part(name: str | None) -> str:
    """The name of a file or folder without where it lies; of a hub id, all of it."""
    if not name:
        return "unknown"
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() or name.count("/") != 1 else name
