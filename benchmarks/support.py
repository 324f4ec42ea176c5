"""A judge of customer support from scores alone, as somebody with a laptop would train it.

    python benchmarks/support.py             # 600 rows, the small real seed model
    python benchmarks/support.py --smallest  # shows that it works with a toy, and measures nothing

Each row has a customer's question, an answer of support, and a score from 1 to 5: one point, and
one more for each of four things that an answer may have (it names the cause, it gives steps, it
says when it is done, it is friendly), with noise, rounded. A run is made of the rows with no other
option; printed are its time and whether it beats what guessing and the untrained seed model give.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Sequence

import measure
from measure import table, verdict

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "two_stage.py"
NOISE = 0.5
MOST_MINUTES = 45
CRITERIA = "Does the answer of support help the customer?"
# What is wrong, and its cause.
PROBLEMS = {
    "The {thing} no longer turns on.": "its battery has run down",
    "My {thing} shows an empty screen.": "its last update was interrupted",
    "I was charged twice for the {thing}.": "the payment was sent a second time after a timeout",
    "The {thing} has still not arrived.": "the carrier has held the parcel at customs",
    "I can't connect the {thing} to my phone.": "both use other versions of Bluetooth",
    "The {thing} makes a loud noise.": "a screw of its fan has come loose",
}
THINGS = ("kettle", "lamp", "headset", "scale", "camera", "clock", "printer", "speaker", "heater", "router")
STEPS = (
    "Please unplug it, wait for a minute, and hold the power button for ten seconds.",
    "Open the settings, choose *Reset*, and confirm with the code on the back.",
    "Send us a photo of the receipt, and then choose *Return* in your account.",
    "First remove the cover, then tighten what is loose, and close it again.",
)
TIMES = (
    "You will hear from us by Friday.",
    "This will be settled within two working days.",
    "We will call you tomorrow before noon.",
    "The money is back in your account in three days.",
)
FRIENDLY = (
    "Thank you for telling us, and we are sorry for the trouble.",
    "We are sorry to hear that, and are glad to help.",
    "Thanks for your patience!",
)
CURT = ("We have read your message.", "Your message was received.", "This is an answer to your request.")
FILLERS = (
    "Our shop has many other products.",
    "You find all terms on our website.",
    "This message was written by our team.",
    "Other customers have asked as well.",
)


def make_row(draw: random.Random, number: int) -> dict[str, Any]:
    """A question, an answer and its score by the rule, with noise."""
    thing, problem = draw.choice(THINGS), draw.choice(list(PROBLEMS))
    parts = [
        (f"The reason is that {PROBLEMS[problem]}.", draw.random() < 0.5),
        (draw.choice(STEPS), draw.random() < 0.5),
        (draw.choice(TIMES), draw.random() < 0.5),
    ]
    is_friendly = draw.random() < 0.5
    told = [part if there else draw.choice(FILLERS) for part, there in parts]
    draw.shuffle(told)
    score = 1 + is_friendly + sum(there for _, there in parts) + draw.gauss(0, NOISE)
    return {
        "id": number,
        "instruction": problem.format(thing=thing),
        "response": " ".join([draw.choice(FRIENDLY if is_friendly else CURT), *told]),
        "criteria": CRITERIA,
        "score": min(5, max(1, round(score))),
    }


def write_rows(path: Path, count: int, seed: int) -> None:
    draw = random.Random(seed)
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = [make_row(draw, number) for number in range(count)]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def show(metrics: dict[str, Any], minutes: float) -> str:
    """The judge's figures, and whether each bar is kept."""
    [name] = [row for row in metrics["rows"] if row.startswith("judge-") and row.endswith(", RAIL")]
    row = metrics["rows"][name]
    lines = []
    for other, gained in row["better_by"].items():
        low, high = gained["intervals"]["rmse"]
        sure = verdict(low > 0)
        lines.append([other, f"{gained['count']}", f"{gained['rmse']:.3f}", f"{low:.3f} to {high:.3f} ({sure})"])
    took = f"{minutes:.1f} minutes (bar {MOST_MINUTES}: {verdict(minutes <= MOST_MINUTES)})"
    ours = f"{name}: n {row['count']}, pearson {row['pearson']:.3f}, rmse {row['rmse']:.3f}; {took}"
    return f"{ours}\n\n{table(['rmse lower than that of', 'n', 'by', '95 % interval'], lines)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0, help="of the rows")
    parser.add_argument("--out", type=Path, help="folder of the data and the run (a temporary one)")
    parser.add_argument("--smallest", action="store_true", help="few rows, a toy seed model, one epoch")
    options = parser.parse_args(argv)
    with TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "support.csv", 40 if options.smallest else options.rows, options.seed)
        print(measure.machine("torch", "llama_cpp_python"), flush=True)
        command = [sys.executable, str(RECIPE), "--data", str(folder / "support.csv"), "--out", str(folder / "run")]
        command += ["--seed-model", "toy", "--epochs", "1"] if options.smallest else []
        start = time.perf_counter()
        subprocess.run(command, check=True)
        metrics = json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))
        print(f"\n{show(metrics, (time.perf_counter() - start) / 60)}")


if __name__ == "__main__":
    main()
