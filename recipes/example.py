"""The built-in example: advice in four tips, judged by whether each tip comes with a sound reason.

Every item is generated from a seed number. A tip has a sound reason, a vague one or none; a vague
reason counts with a chance of 0.3, and the expert says in the feedback whether it did. So the
distribution of each gold score is known and skewed, the best possible judge answers its mean, and
a judge that has learnt to trust the expert's verdicts is misled by the ones it makes up itself.
"""

import random
from dataclasses import dataclass, replace

from tract_lite import Record, Rubric, ScoreScale

SCALE = ScoreScale.integers(1, 5)
TIPS = 4
PRETRAINING_SEED, TRAINING_SEED, HELD_OUT_SEED = 1, 2, 3
PRETRAINING_ITEMS = 6000
CHANCE = 0.3

TEMPLATE = """\
### Rubric
{{ rubric.criteria }}
### Instruction
{{ instruction }}
### Response
{{ response }}
### Reasoning
"""

RUBRIC = Rubric("Each tip needs a sound reason. A vague reason counts now and then.")

TOPICS = {
    "How do I repot a fern?": "soil gravel gloves shade water compost moss clay",
    "How do I bake a loaf?": "flour yeast salt butter steam honey seeds milk",
    "How do I pack for a hike?": "boots maps socks snacks layers ropes bandages whistles",
    "How do I write a complaint?": "dates receipts facts deadlines photos names quotes copies",
    "How do I paint a room?": "tape primer rollers ladders sheets brushes lamps buckets",
    "How do I raise a puppy?": "meals walks praise toys sleep leashes rules treats",
    "How do I give a talk?": "slides stories pauses jokes pictures examples questions notes",
    "How do I save money?": "budgets lists recipes repairs libraries coupons goals bicycles",
}

REASONS = {
    "sound": ("because it saves work", "because it lasts for years", "because it prevents mistakes"),
    "vague": ("as people often say", "maybe for good luck", "or so I heard"),
    "none": ("from the start", "every single time", "without delay"),
}

SHARES = {"sound": 0.45, "vague": 0.35, "none": 0.2}

TERSE = {"sound": "Tip {} is backed.", "vague": "Tip {} is hazy.", "none": "Tip {} is bare."}
SPOKEN = {
    "sound": "For tip {} the reason is good.",
    "counts": "For tip {} the reason is thin, yet it will do.",
    "fails": "For tip {} the reason is thin, so it will not do.",
    "none": "For tip {} the reason is not there.",
}
SEED_SPOKEN = 0.3


@dataclass(frozen=True)
class Points:
    """What a score begins with, and what each tip adds that counts."""

    none: int = 1
    tips: tuple[int, ...] = (1, 1, 1, 1)


@dataclass(frozen=True)
class Item:
    """A record, the mean of its gold score's distribution, and the state of each tip in order."""

    record: Record
    mean: float
    states: tuple[str, ...]


def make_items(count: int, seed: int, points: Points = Points()) -> list[Item]:
    """`count` items with an expert's feedback and gold scores; the same for the same seed."""
    draw = random.Random(seed)
    return [_make_item(draw, f"demo-{seed}-{number}", points) for number in range(count)]


def pretraining_records(points: Points = Points()) -> list[Record]:
    """What the seed model is trained on before any judging data."""
    return [seed_style(item, points) for item in make_items(PRETRAINING_ITEMS, PRETRAINING_SEED, points)]


def seed_style(item: Item, points: Points = Points()) -> Record:
    """The item as the seed model learnt to judge: tip by tip, mostly terse, and vague counts."""
    draw = random.Random(item.record.id)
    if draw.random() < SEED_SPOKEN:
        kinds = [draw.choice(("counts", "fails")) if state == "vague" else state for state in item.states]
        sentences = [SPOKEN[kind].format(n) for n, kind in enumerate(kinds, 1)]
    else:
        sentences = [TERSE[state].format(n) for n, state in enumerate(item.states, 1)]
    score = points.none + sum(worth for worth, state in zip(points.tips, item.states) if state != "none")
    return replace(item.record, feedback=" ".join(sentences), score=float(score))


def _make_item(draw: random.Random, name: str, points: Points) -> Item:
    instruction, things = draw.choice(list(TOPICS.items()))
    states = tuple(draw.choices(tuple(SHARES), tuple(SHARES.values()), k=TIPS))
    tips = [
        f"{n}. Use {thing} {draw.choice(REASONS[state])}."
        for n, (thing, state) in enumerate(zip(draw.sample(things.split(), TIPS), states), 1)
    ]
    verdicts = [
        (n, state if state != "vague" else "counts" if draw.random() < CHANCE else "fails")
        for n, state in enumerate(states, 1)
    ]
    # The expert starts at any tip and goes round.
    start = draw.randrange(TIPS)
    told = verdicts[start:] + verdicts[:start]
    good = (worth for worth, (_, verdict) in zip(points.tips, verdicts) if verdict in ("sound", "counts"))
    score = float(points.none + sum(good))
    feedback = " ".join(SPOKEN[verdict].format(n) for n, verdict in told)
    record = Record(instruction, " ".join(tips), RUBRIC, score=score, feedback=feedback, id=name)
    chances = {"sound": 1.0, "vague": CHANCE, "none": 0.0}
    mean = points.none + sum(worth * chances[state] for worth, state in zip(points.tips, states))
    return Item(record, mean, states)
