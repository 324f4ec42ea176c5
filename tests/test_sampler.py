from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from tract_lite.engines.sampler import TokenSampler
from tract_lite.spec import Sampling

SAMPLING = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.3)


def make_logits(size: int, spread: float, seed: int = 0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def expected_probabilities(sampling: Sampling, logits: np.ndarray, generated: list[int]):
    """What transformers would draw from, after these generated tokens."""
    scores = torch.tensor(logits)[None]
    if generated:
        penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        scores = penalty(torch.tensor([generated]), scores)
    warpers = [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)]
    return LogitsProcessorList(warpers)(None, scores).softmax(-1)[0].numpy()


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 8.0], ids=["even", "flat", "peaked", "sure"])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_tokens_are_drawn_from_the_distribution_of_transformers(spread, top_p):
    draws, sampling = 4000, replace(SAMPLING, top_p=top_p)
    logits = make_logits(40, spread)
    drawn = [TokenSampler(sampling, seed).draw(logits) for seed in range(draws)]
    counts = np.bincount(drawn, minlength=len(logits))
    if spread == 0:
        # All tokens are equally likely, so which of them to leave out is a matter of taste.
        expected = np.full(len(logits), 1 / len(logits))
    else:
        expected = expected_probabilities(sampling, logits, [])
    assert counts[expected == 0].sum() == 0
    # Five standard deviations: a false alarm about once in 40,000 sets of seeds.
    deviation = np.sqrt(draws * expected * (1 - expected))
    assert (abs(counts - draws * expected) <= 5 * deviation + 1).all()


def test_no_token_outside_the_nucleus_of_transformers_is_ever_drawn():
    for seed in range(40):
        sampler, generated = TokenSampler(SAMPLING, seed), []
        for step in range(10):
            logits = make_logits(5000, spread=1.0 + seed / 8, seed=100 * seed + step)
            token = sampler.draw(logits)
            assert expected_probabilities(SAMPLING, logits, generated)[token] > 0
            generated.append(token)


def test_the_penalty_counts_a_repeated_token_once():
    greedy = Sampling(temperature=0.0, repetition_penalty=1.5)
    sampler, generated = TokenSampler(greedy, 0), []
    logits = np.array([-0.2, 1.0, 1.1, 1.2, 1.3, -0.1], dtype=np.float32)
    for _ in range(8):
        expected = torch.tensor(logits)[None]
        if generated:
            penalty = RepetitionPenaltyLogitsProcessor(greedy.repetition_penalty)
            expected = penalty(torch.tensor([generated]), expected)
        generated.append(sampler.draw(logits))
        assert generated[-1] == int(expected.argmax())
    assert 1 < len(set(generated)) < len(generated)


def test_what_is_drawn_hangs_on_the_seed_alone():
    rows = [make_logits(300, spread=1.0, seed=n) for n in range(20)]
    alone = [TokenSampler(SAMPLING, 7).draw(rows[0])]
    sampler, other, again = (TokenSampler(SAMPLING, seed) for seed in (7, 8, 7))
    drawn = [(sampler.draw(row), other.draw(row), again.draw(row)) for row in rows]
    first, second, third = zip(*drawn)
    assert first == third != second and first[0] == alone[0]


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"top_p": 0.0}])
def test_without_chance_the_likeliest_token_is_taken(fields):
    logits = make_logits(300, spread=1.0)
    drawn = {TokenSampler(replace(SAMPLING, **fields), seed).draw(logits) for seed in range(20)}
    assert drawn == {int(logits.argmax())}


def test_the_logits_stay_as_they_are():
    logits = make_logits(300, spread=1.0)
    before, sampler = logits.copy(), TokenSampler(SAMPLING, 0)
    for _ in range(5):
        sampler.draw(logits)
    assert (logits == before).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nothing_is_drawn_from_logits_that_are_not_finite(value):
    logits = make_logits(300, spread=1.0)
    logits[123] = value
    assert TokenSampler(SAMPLING, 0).draw(logits) is None
    assert TokenSampler(SAMPLING, 0).draw(np.full(300, -np.inf)) is None
