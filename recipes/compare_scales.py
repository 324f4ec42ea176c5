"""A scale of 0 to 10, where 10 takes two tokens, three ways: exact, remapped, in words.

    python recipes/compare_scales.py --seeds 1 2 3 4 5      # about three hours on two cores
    python recipes/compare_scales.py --quick --seeds 1      # shows the way, and says nothing

The built-in example, in which tip n is worth n points. All ways begin with one toy seed model that
has met the labels of all of them, and take both stages. What is done is kept in --out.
"""

import argparse
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Sequence

import example
from scipy.stats import t as student

from tract_lite import (
    Sampling,
    ScoreScale,
    TrainSettings,
    evaluate,
    generate_cots,
    make_toy_seed_model,
    reasoning_judge,
    train_adapter,
)

logger = logging.getLogger("compare_scales")

POINTS = example.Points(none=0, tips=(1, 2, 3, 4))
SCALE = ScoreScale.parse("0-10")
NUMERALS = "zero one two three four five six seven eight nine ten".split()
WAYS: dict[str, dict[str, Any]] = {
    "0 to 10, exact": {"scale": SCALE},
    "remapped onto 0 to 9": {"scale": SCALE.remapped(ScoreScale.parse("0-9")), "units": SCALE},
    "words, zero to ten": {"scale": ScoreScale(tuple(NUMERALS), SCALE.values)},
}
# Training items, held-out items, steps of the seed model.
FULL, QUICK = (2600, 1000, 500), (64, 20, 20)


def run(way: str, seed: int, folder: Path, sizes: tuple[int, int, int]) -> dict[str, float]:
    """Train one judge by both stages and measure it, or take what was measured before."""
    done = folder / "figures.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    training, held_out, steps = sizes
    how: dict[str, Any] = {**WAYS[way], "template": example.TEMPLATE, "max_length": 256}
    how["sampling"] = Sampling(max_new_tokens=96)
    seed_model = make_seed_model(steps, how)
    items = [item.record for item in example.make_items(training, example.TRAINING_SEED, POINTS)]
    settings = TrainSettings(batch_size=16, micro_batch_size=16, learning_rate=6e-3, seed=seed)
    how |= {"seed_model": seed_model, "settings": settings, "gradient_checkpointing": False}
    stage_1 = train_adapter(items, folder / "stage1", **how)
    with reasoning_judge(stage_1, parallel=250) as judge:
        own, _ = generate_cots(judge, items, folder / "reasonings.jsonl", seed)
    stage_2 = train_adapter(own, folder / "stage2", **how)
    kept = example.make_items(held_out, example.HELD_OUT_SEED, POINTS)
    with reasoning_judge(stage_2, parallel=250) as judge:
        judged = list(judge.score_many([item.record for item in kept], seed=seed, resume=folder / "judged.jsonl"))
    golds = [item.record.score or 0.0 for item in kept]
    figures = {
        "rmse": evaluate([one.score for one in judged], golds)["rmse"],
        "rmse of the best": evaluate([item.mean for item in kept], golds)["rmse"],
        "mass": fmean(one.mass for one in judged),
        "end_mass": fmean([one.end_mass for one in judged], weights=[one.probabilities.get("1", 1) for one in judged]),
    }
    done.write_text(json.dumps({**figures, "settings": asdict(settings)}, indent=1), encoding="utf-8")
    return figures


def make_seed_model(steps: int, how: dict[str, Any]) -> Path:
    """A toy that has learnt to judge with the labels of each way, a third of the records each."""
    scales = [way["scale"] for way in WAYS.values()]
    records = example.pretraining_records(POINTS)
    mixed = [replace(record, scale=scales[place % len(scales)]) for place, record in enumerate(records)]
    asked = {name: how[name] for name in ("template", "max_length", "sampling")}
    return make_toy_seed_model(mixed, SCALE, any_scale=True, vocabulary_size=800, steps=steps, **asked)


def interval(values: Sequence[float]) -> str:
    """The mean and half of its 95 % interval, by Student's t."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{fmean(values):.3f} ± {half:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="random seeds, a run for each")
    parser.add_argument("--quick", action="store_true", help="a few items and steps")
    parser.add_argument("--out", type=Path, default=Path("runs/scales"), help="folder of all runs")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed in options.seeds:
        for place, way in enumerate(WAYS):
            folder = options.out / f"way{place + 1}-seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            found[way].append(run(way, seed, folder, sizes))
            logger.info("%s, random seed %d: %s", way, seed, found[way][-1])
    first, *_ = found.values()
    best = first[0]["rmse of the best"]
    print(f"\nRMSE on 0 to 10, {len(first)} random seeds, 95 % intervals; best possible {best:.3f}\n")
    print("| way | RMSE | minus the exact one's | mass | end_mass |\n| --- | ---: | ---: | ---: | ---: |")
    for way, runs in found.items():
        differences = [one["rmse"] - exact["rmse"] for one, exact in zip(runs, first)]
        difference = "" if runs is first else interval(differences)
        means = " | ".join(f"{fmean(one[name] for one in runs):.3f}" for name in ("mass", "end_mass"))
        print(f"| {way} | {interval([one['rmse'] for one in runs])} | {difference} | {means} |")


if __name__ == "__main__":
    main()
