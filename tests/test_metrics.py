import json
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from tract_lite.metrics import COLUMNS, evaluate, format_table

ROOT = Path(__file__).parents[1]
VICUNA = ROOT.parent / "shared" / "data" / "vicuna_eval.json"
CORRELATIONS = ("pearson", "spearman", "kendall")


@pytest.fixture(scope="module")
def judges():
    """Two real GPT-4 judgements of the same 320 items."""
    if not VICUNA.is_file():
        pytest.skip("no real data here")
    rows = json.loads(VICUNA.read_text(encoding="utf-8"))
    first, second, _ = zip(*(row["gpt4_score"] for row in rows))
    return first, second


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


def test_the_figures_of_two_real_judges_are_those_of_scipy(judges):
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


def test_a_thousand_items_take_less_than_two_seconds():
    golds = np.random.default_rng(0).integers(1, 6, 1000)
    start = time.perf_counter()
    evaluate(golds + np.linspace(0, 1, 1000), golds)
    assert time.perf_counter() - start < 2


def test_the_result_is_plain_json(judges):
    result = evaluate(*(np.array(scores, dtype=np.float32) for scores in judges))
    restored = json.loads(json.dumps(result))
    assert restored["intervals"].pop("rmse") == list(result["intervals"]["rmse"])
    assert list(result) == ["pearson", "spearman", "kendall", "rmse", "mae", "qwk", "coverage", "count", "intervals"]
    assert all(type(value) in (float, int, dict) for value in result.values())


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


def test_importing_metrics_needs_numpy_alone():
    heavy = {"torch", "transformers", "datasets", "pandas", "pyarrow", "scipy"}
    code = f"import sys, tract_lite.metrics; print(sorted({heavy} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "[]\n", result.stderr
