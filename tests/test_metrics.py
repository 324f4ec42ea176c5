import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from tract_lite.judgement import Judgement
from tract_lite.metrics import COLUMNS, RESAMPLES, better_by, choose_gate, compare_judges, evaluate, format_table

ROOT = Path(__file__).parents[1]
VICUNA = ROOT.parent / "shared" / "data" / "vicuna_eval.json"
CORRELATIONS = ("pearson", "spearman", "kendall")


REAL = pytest.param("real", marks=pytest.mark.skipif(not VICUNA.is_file(), reason="no real data here"))


@pytest.fixture(scope="module", params=["made", REAL])
def judges(request):
    """Two judgements of the same 320 items, made or GPT-4's."""
    if request.param == "real":
        rows = json.loads(VICUNA.read_text(encoding="utf-8"))
        first, second, _ = zip(*(row["gpt4_score"] for row in rows))
        return first, second
    return made_judge(0), made_judge(1)


GOLDS = np.random.default_rng(7).integers(1, 6, 320)


def made_judge(seed, noise=0.8):
    """A judge of whole numbers that is right up to some noise."""
    random = np.random.default_rng(seed)
    return np.clip(np.rint(GOLDS + random.normal(scale=noise, size=len(GOLDS))), 1, 5).astype(int).tolist()


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def kappa_by_matrix(predictions, golds):
    """Quadratic weighted kappa as it is defined: by the confusion matrix."""
    labels = range(min(*predictions, *golds), max(*predictions, *golds) + 1)
    observed = np.array([[sum(p == a and g == b for p, g in zip(predictions, golds)) for b in labels] for a in labels])
    chance = np.outer(observed.sum(axis=1), observed.sum(axis=0)) / len(golds)
    weights = np.subtract.outer(labels, labels) ** 2
    if not (weights * chance).sum():
        return math.nan
    return 1 - (weights * observed).sum() / (weights * chance).sum()


def test_the_figures_of_two_judges_are_those_of_scipy(judges):
    result = evaluate(*judges)
    first, second = map(np.array, judges)
    assert result["pearson"] == pytest.approx(stats.pearsonr(first, second).statistic)
    assert result["spearman"] == pytest.approx(stats.spearmanr(first, second).statistic)
    assert result["kendall"] == pytest.approx(stats.kendalltau(first, second).statistic)
    assert result["rmse"] == pytest.approx(math.sqrt(np.mean((first - second) ** 2)))
    assert result["mae"] == pytest.approx(np.mean(abs(first - second)))
    assert result["qwk"] == pytest.approx(kappa_by_matrix(*judges))
    assert (result["coverage"], result["count"]) == (1.0, 320)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 10), st.integers(-2, 10)), min_size=1, max_size=30))
def test_kappa_is_that_of_the_confusion_matrix(pairs):
    predictions, golds = zip(*pairs)
    expected = kappa_by_matrix(predictions, golds)
    assert evaluate(predictions, golds)["qwk"] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_kappa_rounds_to_the_nearest_integer():
    golds = [1, 2, 3, 5]
    assert evaluate([1.4, 1.6, 3.2, 4.9], golds)["qwk"] == 1.0
    assert evaluate([1.4, 2.6, 3.2, 4.9], golds)["qwk"] == evaluate([1, 3, 3, 5], golds)["qwk"] < 1


def test_failed_items_count_against_coverage_alone():
    whole = evaluate([1.5, 2.0, 4.5], [1, 2, 5])
    with_failures = evaluate([None, 1.5, math.nan, 2.0, 4.5, math.inf], [3, 1, 3, 2, 5, 3])
    assert whole["coverage"] == 1.0 and with_failures["coverage"] == 0.5
    assert with_failures == whole | {"coverage": 0.5}
    assert with_failures["count"] == 3


@pytest.mark.parametrize(
    "predictions, golds", [([3, 3, 3], [1, 2, 3]), ([1, 2, 3], [3, 3, 3]), ([2], [2]), ([None, 4.5], [1, 2])]
)
def test_correlations_that_do_not_exist_are_nan_without_a_warning(predictions, golds):
    result = evaluate(predictions, golds)
    assert all(math.isnan(result[name]) for name in CORRELATIONS)
    assert all(map(math.isnan, result["intervals"]["pearson"] + result["intervals"]["spearman"]))
    assert math.isfinite(result["rmse"]) and math.isfinite(result["mae"])


def test_one_item_has_no_interval():
    assert all(map(math.isnan, evaluate([2.5], [2])["intervals"]["rmse"]))


def test_a_judge_that_always_failed_has_nan_figures():
    result = evaluate([None, math.nan], [1, 2])
    assert (result.pop("coverage"), result.pop("count")) == (0.0, 0)
    assert all(map(math.isnan, sum(result.pop("intervals").values(), ())))
    assert all(map(math.isnan, result.values()))


@pytest.mark.parametrize(
    "predictions, golds, fault",
    [
        ([], [], "pair up"),
        ([1, 2], [1], "pair up"),
        ([1], [1, 2], "pair up"),
        ([1, 2], [1, None], r"items \[1\]"),
        ([1, 2], [math.inf, 2], r"items \[0\]"),
    ],
)
def test_golds_must_be_there_and_finite(predictions, golds, fault):
    with pytest.raises(ValueError, match=fault):
        evaluate(predictions, golds)


def test_the_bootstrap_agrees_with_that_of_scipy(judges):
    first, second = map(np.array, judges)
    ours = evaluate(first, second)["intervals"]
    for name, statistic in {
        "pearson": lambda x, y, axis: stats.pearsonr(x, y, axis=axis).statistic,
        "mae": lambda x, y, axis: np.mean(abs(x - y), axis=axis),
    }.items():
        theirs = stats.bootstrap(
            (first, second),
            statistic,
            paired=True,
            method="percentile",
            n_resamples=1000,
            vectorized=True,
            rng=np.random.default_rng(5),
        ).confidence_interval
        # Two bootstraps of 1,000 differ by a few per cent of the width; 15 % is far outside.
        assert ours[name] == pytest.approx(theirs, abs=0.15 * (theirs.high - theirs.low))


def test_intervals_hold_the_figure_and_narrow_with_the_items():
    random = np.random.default_rng(3)
    golds = random.integers(1, 6, 400)
    predictions = golds + random.normal(size=400)
    few, many = evaluate(predictions[:40], golds[:40]), evaluate(predictions, golds)
    for name, (low, high) in many["intervals"].items():
        assert low < many[name] < high
        assert high - low < np.diff(few["intervals"][name])[0]


def test_constant_resamples_do_not_spoil_the_interval_of_a_few_items():
    low, high = evaluate([1, 2, 4], [1, 3, 4])["intervals"]["pearson"]
    assert 0.9 < low <= high <= 1


def test_evaluating_twice_gives_the_same_result_and_leaves_numpy_alone(judges):
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    assert evaluate(*judges) == evaluate(*judges)
    assert np.random.get_state()[1].tolist() == before


def test_the_result_is_plain_json(judges):
    result = evaluate(*(np.array(scores, dtype=np.float32) for scores in judges))
    restored = json.loads(json.dumps(result))
    assert restored["intervals"].pop("rmse") == list(result["intervals"]["rmse"])
    assert list(result) == ["pearson", "spearman", "kendall", "rmse", "mae", "qwk", "coverage", "count", "intervals"]
    assert all(type(value) in (float, int, dict) for value in result.values())


# Two judges on the same items

FIGURES = {
    "pearson": lambda scores, golds: stats.pearsonr(scores, golds).statistic,
    "spearman": lambda scores, golds: stats.spearmanr(scores, golds).statistic,
    "rmse": lambda scores, golds: math.sqrt(np.mean((scores - golds) ** 2)),
    "mae": lambda scores, golds: np.mean(abs(scores - golds)),
}


def brute_force(measure, count):
    """The 95 % interval of each figure over the same resamples, each by itself, with scipy."""
    resamples = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            name: tuple(np.nanpercentile([measure(figure, items) for items in resamples], [2.5, 97.5]))
            for name, figure in FIGURES.items()
        }


def check_comparison(first, second, golds):
    a, b, gold = (np.array(scores, dtype=float) for scores in (first, second, golds))
    compared = compare_judges(first, second, golds)
    expected = brute_force(lambda figure, i: figure(a[i], gold[i]) - figure(b[i], gold[i]), len(gold))
    for name, figure in FIGURES.items():
        assert compared["differences"][name] == pytest.approx(figure(a, gold) - figure(b, gold), abs=1e-12)
        assert compared["intervals"][name] == pytest.approx(expected[name], abs=1e-12)
    alone = evaluate(first, golds)["intervals"]
    expected = brute_force(lambda figure, i: figure(a[i], gold[i]), len(gold))
    assert alone == {name: pytest.approx(interval, abs=1e-12) for name, interval in expected.items()}
    return compared


def test_intervals_are_those_of_a_paired_bootstrap_by_brute_force():
    check_comparison(made_judge(3)[:40], made_judge(4, 2.0)[:40], GOLDS[:40].tolist())


def test_resamples_of_one_item_alone_are_left_out_of_a_few_items_intervals():
    """One in nine draws one of the three items thrice: its correlation does not exist."""
    compared = check_comparison([1, 2, 4], [2.5, 2, 3], [1, 3, 4])
    assert all(map(math.isfinite, compared["intervals"]["pearson"] + compared["intervals"]["spearman"]))


def test_a_judge_that_always_says_the_same_differs_in_its_errors_alone():
    golds = [1, 2, 3, 4, 5, 1]
    # A third is not exact in binary: its mean of many is not always itself.
    compared = compare_judges([10 / 3] * 6, golds, golds)
    for figures in (compared["differences"], compared["a"]):
        assert math.isnan(figures["pearson"]) and math.isnan(figures["spearman"])
    assert all(map(math.isnan, compared["intervals"]["pearson"] + compared["intervals"]["spearman"]))
    low, high = compared["intervals"]["rmse"]
    assert 0 < low < compared["differences"]["rmse"] < high
    assert compared["b"]["pearson"] == pytest.approx(1)
    alone = evaluate([10 / 3] * 6, golds)["intervals"]
    assert all(map(math.isnan, alone["pearson"])) and all(map(math.isfinite, alone["rmse"]))


def test_a_judge_and_its_twin_do_not_differ_at_all():
    scores = made_judge(1)
    compared = compare_judges(scores, scores, GOLDS)
    assert set(compared["differences"].values()) == {0}
    assert set(compared["intervals"].values()) == {(0, 0)}


def test_pairing_finds_a_difference_that_two_intervals_would_hide():
    """What makes an item hard for both is in both errors, and not in their difference."""
    hard = np.random.default_rng(5).normal(scale=2, size=320)
    better, worse = GOLDS + hard, GOLDS + hard * 1.05
    compared = compare_judges(better, worse, GOLDS)
    assert compared["intervals"]["rmse"][1] < 0
    assert compared["a"]["intervals"]["rmse"][1] > compared["b"]["intervals"]["rmse"][0]


def test_exchanging_the_judges_turns_the_signs():
    one, other = (
        compare_judges(made_judge(1), made_judge(2), GOLDS),
        compare_judges(made_judge(2), made_judge(1), GOLDS),
    )
    assert one["a"] == other["b"] and one["b"] == other["a"]
    for name, difference in one["differences"].items():
        assert difference == pytest.approx(-other["differences"][name])
        assert one["intervals"][name] == pytest.approx([-end for end in reversed(other["intervals"][name])])


def test_items_that_one_of_the_judges_failed_at_are_left_out_for_both():
    a, b = made_judge(1)[:30], made_judge(2)[:30]
    whole = compare_judges(a, b, GOLDS[:30])
    gaps_a = [None, *a, 2.0, math.inf]
    gaps_b = [3.0, *b, math.nan, 4.0]
    assert compare_judges(gaps_a, gaps_b, [1, *GOLDS[:30], 2, 3]) == whole
    assert whole["count"] == whole["a"]["count"] == 30 and whole["a"]["coverage"] == 1.0
    assert whole["a"] == evaluate(a, GOLDS[:30])


def test_judgements_are_compared_as_their_scores_are():
    def judgements(scores):
        return [Judgement(str(n), score=math.nan if score is None else score) for n, score in enumerate(scores)]

    a, b = [1.5, None, 3.5, 2.0, 4.0], [1.0, 2.0, None, 3.0, 5.0]
    golds = [1, 2, 3, 4, 5]
    assert repr(compare_judges(judgements(a), judgements(b), golds)) == repr(compare_judges(a, b, golds))
    assert compare_judges(judgements(a), b, golds)["count"] == 3


def test_one_item_has_differences_and_no_interval():
    compared = compare_judges([2.0], [3.5], [2])
    assert compared["differences"]["mae"] == -1.5
    assert all(map(math.isnan, sum(compared["intervals"].values(), ())))


@pytest.mark.parametrize(
    "a, b, golds, fault",
    [
        ([1, 2], [1], [1, 2], "pair up, got 2, 1 and 2 of them"),
        ([1, 2], [1, 2], [1], "pair up, got 2, 2 and 1"),
        ([1], [1, 2], [1, 2], "pair up"),
        ([], [], [], "pair up"),
        ([1, None], [None, 2], [1, 2], "no item that both judges have judged"),
        ([1, None, 2], [1, 2, 2], [1, math.nan, 2], r"items \[1\]"),
        ([1, 2], [1, 2], [1, None], r"items \[1\]"),
    ],
)
def test_judges_that_can_t_be_compared_are_refused(a, b, golds, fault):
    with pytest.raises(ValueError, match=fault):
        compare_judges(a, b, golds)


def test_a_comparison_is_plain_json_and_the_same_every_time():
    compared = compare_judges(np.array(made_judge(1), dtype=np.float32), made_judge(2), GOLDS)
    assert compared == compare_judges(made_judge(1), made_judge(2), GOLDS)
    assert list(json.loads(json.dumps(compared))) == ["count", "differences", "intervals", "a", "b"]


def test_what_a_judge_gains_is_the_difference_of_the_comparison_turned_round():
    first, second = [None, *made_judge(1)[:40]], [3.0, *made_judge(2, 2.0)[:40]]
    golds = [2, *GOLDS[:40].tolist()]
    gained, compared = better_by(first, second, golds), compare_judges(first, second, golds)
    assert gained["count"] == compared["count"] == 40
    for name in ("rmse", "mae"):
        assert gained[name] == pytest.approx(-compared["differences"][name])
        low, high = compared["intervals"][name]
        assert gained["intervals"][name] == pytest.approx((-high, -low))


def test_a_gain_on_several_scales_is_of_places_and_one_off_the_scale_is_none():
    ends = [(0.0, 1.0), (0.0, 100.0)]
    gained = better_by([0.5, 60.0], [1.0, 90.0], [0.5, 50.0], ends)
    assert gained["mae"] == pytest.approx((0.5 - 0 + 0.4 - 0.1) / 2)
    off = better_by([1.0, 2.0], [2.0, 3.0], [1.0, 9.0], (1.0, 5.0))
    assert math.isnan(off["mae"]) and all(map(math.isnan, off["intervals"]["rmse"]))
    with pytest.raises(ValueError, match="no item that both"):
        better_by([None, 1.0], [1.0, None], [1.0, 2.0])


def test_a_table_has_one_aligned_row_per_result(judges):
    table = format_table({"base": evaluate([None, 3], [1, 3]), "after stage 2": evaluate(*judges)})
    header, rule, base, after = table.splitlines()
    assert [cell.strip() for cell in header.split("|")[2:-1]] == list(COLUMNS)
    assert [cell.strip() for cell in base.split("|")[1:-1]] == ["base", "nan", "nan", "nan", "0.000", "0.000", "0.500"]
    assert "| after stage 2 |" in after and set(rule) <= set("|-: ")
    assert len({len(line) for line in (header, rule, base, after)}) == 1


def test_a_table_shows_the_columns_it_is_asked_for(judges):
    result = evaluate(*judges)
    assert format_table({"a": result}, ("qwk",)).splitlines()[-1] == f"| a | {result['qwk']:.3f} |"


def judged(spread: float, tokens: int, **fields) -> Judgement:
    """A judgement in doubt by `spread`, after a reasoning of so many tokens."""
    half = {"probabilities": {"1": 0.5, "2": 0.5}, "mass": 1.0, "values": {"1": 0.0, "2": 2 * spread}}
    return Judgement("a", score=1.0, feedback_ids=[[5] * tokens] * (tokens > 0), **{**half, **fields})


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), st.integers(0, 9)), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_a_gate_writes_as_much_as_it_may_and_not_more(items, share):
    direct, reasoned = zip(*((judged(doubt, 0), judged(doubt, tokens)) for doubt, tokens in items))
    gate = choose_gate(direct, reasoned, share)
    total = sum(tokens for _, tokens in items)
    assert sum(tokens for doubt, tokens in items if doubt > gate) <= share * total
    # The next gate below lets those through that are in the same doubt.
    assert gate == 0 or sum(tokens for doubt, tokens in items if doubt >= gate) > share * total


def test_without_reasonings_a_gate_takes_all_of_them_to_be_of_one_length():
    direct = [judged(doubt, 0) for doubt in (0.1, 0.2, 0.3, 0.4)]
    assert choose_gate(direct, share=0.5) == pytest.approx(0.2)
    assert choose_gate(direct, [judged(0, tokens) for tokens in (1, 1, 9, 9)], 0.5) == pytest.approx(0.3)
    assert choose_gate(direct, share=1) == 0


def test_a_gate_is_chosen_from_what_was_judged():
    failed = judged(9.0, 0, error="too long")
    direct, reasoned = [judged(0.1, 0), judged(0.2, 0)], [judged(0, 5), judged(0, 5)]
    assert choose_gate([*direct, failed], [*reasoned, judged(0, 5)], 0.5) == choose_gate(direct, reasoned, 0.5)
    with pytest.raises(ValueError, match="got 0 and 0.5"):
        choose_gate([failed], [failed], 0.5)
    with pytest.raises(ValueError, match="got 2 and 35"):
        choose_gate(direct, reasoned, 35)
    with pytest.raises(ValueError):
        choose_gate(direct, reasoned[:1])


def test_importing_metrics_needs_numpy_alone():
    heavy = {"torch", "transformers", "datasets", "pandas", "pyarrow", "scipy"}
    code = f"import sys, tract_lite.metrics; print(sorted({heavy} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "[]\n", result.stderr
