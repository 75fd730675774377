"""Intervals and tests: known values, and the rates they promise on data made for it."""

import numpy as np
import pytest
from scipy import stats

from hooked_vlm.analysis import (
    benjamini_hochberg,
    bootstrap_two_way,
    estimate_mean,
    holm,
    paired_change,
    rank_p,
    score_interval,
)
from hooked_vlm.analysis.statistics import paired_p, share


def test_share_is_wilsons_interval() -> None:
    found = share(8, 10)  # by hand: (0.8 + z²/20 ± z sqrt(0.016 + z²/400)) / (1 + z²/10)
    assert (found.value, found.n) == (0.8, 10)
    assert found.low == pytest.approx(0.4901625, abs=1e-6)
    assert found.high == pytest.approx(0.9433178, abs=1e-6)
    assert share(0, 5).low == 0.0
    assert share(5, 5).high == 1.0


@pytest.mark.parametrize("n", [6, 40])
def test_paired_p_agrees_with_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.random(n), rng.random(n) + 0.15
    reference = stats.permutation_test((a, b), lambda x, y: np.mean(x - y), permutation_type="samples", rng=0)
    assert paired_p(a, b, seed=0) == pytest.approx(reference.pvalue, abs=0.02)
    assert paired_p(a, a, seed=0) == 1.0


def test_score_interval_of_0_and_1_is_wilsons() -> None:
    for right, n in ((0, 7), (3, 7), (7, 7), (40, 100)):
        values = np.repeat([1.0, 0.0], [right, n - right])
        low, high = score_interval(values)
        expected = share(right, n)
        assert (float(low), float(high)) == pytest.approx((expected.low, expected.high), abs=1e-12)
    low, high = score_interval(np.array([[0.0, 0.5], [1.0, 0.5], [0.0, 0.5]]))  # each column by itself
    assert low[0] == pytest.approx(share(1, 3).low) and low[1] < 0.5 < high[1]
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        score_interval(np.array([0.0, 1.5]))


@pytest.mark.parametrize("n", [20, 60, 200])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("score", [0.02, 0.5, 0.9, 0.98])
def test_score_intervals_cover_the_mean_of_scores(n: int, tokens: int, score: float) -> None:
    """Means of a few 0/1 tokens that depend on each other within a sample."""
    rng = np.random.default_rng(n)
    own = rng.beta(2 * score, 2 * (1 - score), size=(n, 1000))
    low, high = score_interval(rng.binomial(tokens, own) / tokens)
    assert 0.90 <= ((low <= score) & (score <= high)).mean() <= 0.99


def test_score_intervals_of_tokens_generalise_over_samples() -> None:
    """Six tokens that are all copied or none: as many observations as samples; ungrouped intervals are too narrow."""
    rng, covered, alone = np.random.default_rng(0), 0, 0
    for _ in range(300):
        own = (rng.random(60) < 0.9).astype(float)
        tokens, groups = own.repeat(6), np.arange(60).repeat(6)
        low, high = score_interval(tokens, groups)
        assert (float(low), float(high)) == pytest.approx([float(end) for end in score_interval(own)])
        covered += bool(low <= 0.9 <= high)
        alone += bool(score_interval(tokens)[0] <= 0.9 <= score_interval(tokens)[1])
    assert 0.90 * 300 <= covered <= 0.99 * 300 and alone < 0.75 * 300


def test_paired_change_by_hand_and_without_changes() -> None:
    found = paired_change(np.array([1.0, 1, 1, 0]), np.array([0.0, 0, 1, 0]))  # -1 -1 0 0, widened by -1 and 1
    half = 1.959964 * np.sqrt(4 / 6 - (2 / 6) ** 2) / np.sqrt(6)
    assert found.value == -0.5
    assert (found.low, found.high) == pytest.approx((-2 / 6 - half, -2 / 6 + half), abs=1e-6)
    same = paired_change(np.ones(100), np.ones(100))
    assert same.value == 0 and same.low == -same.high and 0.01 < same.high < 0.04


@pytest.mark.parametrize("changes", [(0.02, 0.0), (0.05, 0.02), (0.3, 0.05), (0.9, 0.0)])
def test_paired_changes_cover_the_difference(changes: tuple[float, float]) -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(500):
        kinds = rng.choice(3, size=100, p=[*changes, 1 - sum(changes)])
        found = paired_change((kinds == 0).astype(float), (kinds == 1).astype(float))
        covered += found.low <= changes[1] - changes[0] <= found.high
    assert covered >= 0.92 * 500


def test_two_way_bootstrap_covers_where_draws_differ_more_than_samples() -> None:
    """A bootstrap of samples alone covers in fewer than half of these."""
    rng, covered, alone = np.random.default_rng(0), 0, 0
    for _ in range(200):
        table = rng.normal(size=(20, 1)) + 0.5 * rng.normal(size=(1, 100)) + rng.normal(size=(20, 100))
        found, narrow = bootstrap_two_way(table, 0, 500), estimate_mean(table.mean(0), 0)
        assert found.value == pytest.approx(table.mean()) and found.n == 100
        covered += found.low <= 0 <= found.high
        alone += narrow.low <= 0 <= narrow.high
    assert 0.88 * 200 <= covered <= 0.98 * 200
    assert alone < 0.6 * 200


def test_rank_p_counts_the_draws_that_are_as_far() -> None:
    drawn = np.arange(1.0, 21.0)
    assert rank_p(0.5, drawn, "lower") == 1 / 21 and rank_p(0.5, drawn, "higher") == 1.0
    assert rank_p(3.0, drawn, "lower") == 4 / 21 and rank_p(20.0, drawn, "higher") == 2 / 21
    rng = np.random.default_rng(0)
    ps = [rank_p(values[0], values[1:], "lower") for values in rng.normal(size=(2000, 21))]
    assert np.mean(np.array(ps) <= 0.05) == pytest.approx(0.048, abs=0.015)


def test_adjusted_p_values() -> None:
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    assert holm(p) == pytest.approx([0.03, 0.06, np.nan, 0.06, 0.02], nan_ok=True)  # by hand
    assert benjamini_hochberg(p) == pytest.approx([0.02, 0.04, np.nan, 0.04, 0.02], nan_ok=True)
    assert np.isnan(holm(np.array([np.nan]))).all() and np.isnan(benjamini_hochberg(np.array([np.nan]))).all()
