"""How fast an engine writes reasonings, from a few seconds of it."""

from dataclasses import dataclass, replace
from statistics import fmean
from time import perf_counter
from typing import Sequence

from tract_lite.engines.task import Engine, Sample, Task

# Tokens of a prompt that are read to find out for how many there is time.
LEAST_READ = 32
# Tokens of each reasoning that are written at first, and then twice as many as before.
LEAST_WRITTEN = 2


@dataclass(frozen=True)
class Pace:
    """Seconds for a token of a prompt, and for one of a reasoning, as many at once as there may be.

    `together`: how many reasonings are written in a group that waits for its longest one.
    """

    prompt: float
    token: float
    together: int = 1

    def seconds(self, prompts: Sequence[int], reasonings: Sequence[int]) -> float:
        """What reading prompts and writing reasonings of these lengths (in tokens) takes."""
        groups = (reasonings[start : start + self.together] for start in range(0, len(reasonings), self.together))
        return self.prompt * sum(prompts) + self.token * sum(len(group) * max(group) for group in groups)


def measure_pace(engine: Engine, prompts: Sequence[Sequence[int]], seconds: float) -> Pace:
    """Measure an engine on prompts (ids), in about `seconds`: what there is no time for is cut."""
    at_once = _at_once(engine)
    prompts, share = prompts[:at_once], seconds / 4
    first = [prompts[0][-LEAST_READ:]]
    _timed(engine, first, 1)  # warms up
    budget = int(share * len(first[0]) / _timed(engine, first, 1)[0])
    whole = prompts[: max(1, int(budget / fmean(map(len, prompts))))]
    read = [prompt[-max(budget, LEAST_READ) :] for prompt in whole]
    prompt = _timed(engine, read, 1)[0] / sum(map(len, read))
    short = [ids[-max(1, int(share / prompt / len(prompts))) :] for ids in prompts]
    before, steps, spent = _timed(engine, short, 1)[0], LEAST_WRITTEN, 0.0
    while True:
        after, samples = _timed(engine, short, 1 + steps)
        spent += after
        if spent + 2 * after > 2 * share or steps >= engine.spec.sampling.max_new_tokens:
            break
        steps *= 2
    written = sum(len(sample.reasoning) - 1 for sample in samples)
    # An engine that writes one sequence after the other as its memory allows makes none wait.
    together = 1 if "parallel" in engine.shape else at_once
    return Pace(prompt, max(0.0, after - before) / max(1, written), together)


def measure_length(engine: Engine, prompts: Sequence[Sequence[int]], pace: Pace, seconds: float) -> float:
    """How many tokens an engine's reasonings for such prompts have, by what it writes in `seconds`.

    Those that are cut off then would have ended as often as the others.
    """
    most = engine.spec.sampling.max_new_tokens
    few = prompts[: max(1, min(_at_once(engine), int(seconds / 2 / (pace.prompt * len(prompts[0])))))]
    steps = int(seconds / 2 / (pace.token * len(few))) if pace.token else most
    samples = _timed(engine, few, max(2, min(most, steps)))[1]
    written, ended = sum(len(sample.reasoning) for sample in samples), sum(not sample.truncated for sample in samples)
    return min(most, written / ended) if ended else float(most)


def _at_once(engine: Engine) -> int:
    """How many sequences an engine computes at once."""
    return engine.shape.get("parallel") or engine.shape["batch_size"]


def _timed(engine: Engine, prompts: Sequence[Sequence[int]], most: int) -> tuple[float, list[Sample]]:
    """The seconds for reasonings of `most` tokens after each prompt, and the reasonings."""
    spec = engine.spec
    engine.spec = replace(spec, sampling=replace(spec.sampling, max_new_tokens=most))
    start = perf_counter()
    try:
        answers = [answer for _, answer in engine.run(Task(list(ids), [n]) for n, ids in enumerate(prompts))]
    finally:
        engine.spec = spec
    return perf_counter() - start, [sample for answer in answers if isinstance(answer, list) for sample in answer]
