"""Intervals of few observations, of groups and of pairs: by hand, against scipy, and their coverage."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from hooked_vlm.analysis.intervals import (
    estimate_mean,
    jackknife_interval,
    mean_interval,
    mean_p,
    ratio_interval,
    share_interval,
)
from hooked_vlm.analysis.statistics import share


def test_few_observations_have_students_interval_or_none() -> None:
    x = np.random.default_rng(0).normal(2, 1, (6, 3))
    low, high = mean_interval(x, seed=0)
    expected = stats.ttest_1samp(x, 0.0).confidence_interval()
    np.testing.assert_allclose([low, high], [expected.low, expected.high])
    assert np.isnan(mean_interval(x[:2], seed=0)).all() and not np.isnan(mean_interval(x[:3], seed=0)).any()
    missing = np.where(np.arange(6)[:, None] < 4, np.nan, x)
    assert np.isnan(mean_interval(missing, seed=0)).all()
    np.testing.assert_allclose(mean_interval(np.concatenate((x, missing)), seed=0)[0].shape, (3,))


def test_many_observations_have_scipys_bootstrap_interval_widened() -> None:
    x = np.random.default_rng(1).exponential(size=400)
    low, high = mean_interval(x, seed=0)
    expected = stats.bootstrap((x,), np.mean, method="BCa", n_resamples=4000, rng=0).confidence_interval
    assert (float(low), float(high)) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_missing_numbers_are_left_out_and_cells_do_not_depend_on_each_other() -> None:
    rng = np.random.default_rng(2)
    values, scale = rng.normal(2, 1, (30, 5)), rng.normal(4, 1, 30)
    values[3, 1], values[4:25, 2], scale[7] = np.nan, np.inf, np.nan
    low, high = ratio_interval(values, scale, seed=0)
    for cell in range(5):
        own = ratio_interval(values[:, cell], scale, seed=0)
        np.testing.assert_allclose([low[cell], high[cell]], own)
    found = estimate_mean(values[:, 2], seed=0)
    few = values[np.isfinite(values[:, 2]), 2]
    assert found.n == 9 and found.value == pytest.approx(few.mean())
    assert (found.low, found.high) == pytest.approx(tuple(stats.ttest_1samp(few, 0.0).confidence_interval()))


def test_a_constant_has_an_interval_of_no_width() -> None:
    for n in (5, 20):
        np.testing.assert_allclose(mean_interval(np.full(n, 3.0), seed=0), (3.0, 3.0))
    assert mean_p(np.zeros(5)) == 1.0 and np.isnan(mean_p(np.ones(2)))


def test_groups_are_resampled_whole() -> None:
    """Rows that repeat say nothing new: the interval by group is that of the groups alone."""
    own = np.random.default_rng(3).normal(size=(12, 2))
    groups = np.repeat(np.arange(12), 4)
    np.testing.assert_allclose(mean_interval(own[groups], 0, groups), mean_interval(own, 0))
    np.testing.assert_allclose(mean_p(own[groups], groups), mean_p(own))
    np.testing.assert_allclose(mean_p(own), np.asarray(stats.ttest_1samp(own, 0.0)[1]))
    assert np.isnan(mean_interval(own[groups][:8], 0, groups[:8])).all()  # two groups


def test_the_jackknife_of_a_mean_is_students_interval() -> None:
    x = np.random.default_rng(4).normal(1, 1, 9)
    low, high, p = jackknife_interval(lambda used: float(x[used].mean()), np.arange(9))
    reference = stats.ttest_1samp(x, 0.0)
    assert (low, high) == pytest.approx(tuple(reference.confidence_interval()))
    assert p == pytest.approx(reference[1])
    assert np.isnan(jackknife_interval(lambda used: float("nan"), np.arange(9))).all()
    assert np.isnan(jackknife_interval(lambda used: 1.0, np.arange(2))).all()


def test_shares_have_wilsons_interval() -> None:
    right = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [np.nan, 0.0, np.nan], [1.0, np.nan, np.nan]])
    low, high = share_interval(right)
    assert (low[0], high[0]) == (share(3, 3).low, share(3, 3).high)
    assert (low[1], high[1]) == (share(1, 3).low, share(1, 3).high)
    assert np.isnan([low[2], high[2]]).all()


# ---------------------------------------------------------------- coverage

SKEWED: dict[str, Any] = {
    "normal": (lambda rng, size: rng.normal(1, 1, size), 1.0),
    "gamma": (lambda rng, size: rng.gamma(2, 1, size), 2.0),  # skewness 1.4
    "log-normal": (lambda rng, size: rng.lognormal(0, 0.5, size), np.exp(0.125)),  # 1.75
    "counts": (lambda rng, size: rng.integers(3, 9, size).astype(float), 5.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 4, 6, 9, 10, 15, 30, 100])
@pytest.mark.parametrize("kind", SKEWED)
def test_intervals_of_means_cover_them_at_their_rate(kind: str, n: int) -> None:
    draw, mean = SKEWED[kind]
    low, high = mean_interval(draw(np.random.default_rng([n, 0]), (n, 2000)), seed=0, draws=1000)
    assert 0.90 <= ((low <= mean) & (mean <= high)).mean() <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 6, 9, 10, 20, 50])
def test_intervals_of_ratios_of_means_cover_them_at_their_rate(n: int) -> None:
    """Effects of a patch are half of the way, which differs between examples, and noise."""
    rng, covered = np.random.default_rng([n, 1]), []
    for _ in range(500):
        gap = rng.normal(5, 2, n)
        effects = 0.5 * gap[:, None] + 0.7 * (rng.gamma(2, 1, (n, 4)) - 2)
        low, high = ratio_interval(effects, gap, seed=0, draws=1000)
        covered += ((low <= 0.5) & (high >= 0.5)).tolist()
    assert 0.90 <= np.mean(covered) <= 0.98


def nested(rng: np.random.Generator, names: int, cells: int, within: float) -> tuple[np.ndarray, np.ndarray]:
    """Pictures nested in names, two to eight of each: [picture, cell], and the name of each."""
    groups = np.repeat(np.arange(names), rng.integers(2, 9, names))
    return rng.normal(size=(names, cells))[groups] + within * rng.normal(size=(len(groups), cells)), groups


@pytest.mark.slow
@pytest.mark.parametrize("names", [4, 8, 10, 20, 40])
def test_intervals_by_name_cover_what_those_by_picture_do_not(names: int) -> None:
    rng, by_name, by_picture, ps = np.random.default_rng([names, 2]), [], [], []
    for _ in range(40):
        values, groups = nested(rng, names, 50, within=1.0)
        for ends, into in ((mean_interval(values, 0, groups, 1000), by_name), (mean_interval(values, 0), by_picture)):
            into.append(((ends[0] <= 0) & (ends[1] >= 0)).mean())
        ps.append((mean_p(values, groups) <= 0.05).mean())
    assert 0.90 <= np.mean(by_name) <= 0.98 and 0.02 <= np.mean(ps) <= 0.09
    assert np.mean(by_picture) < 0.85


@pytest.mark.slow
@pytest.mark.parametrize("agreement", [0.0, 0.6, 0.9])
def test_intervals_over_samples_cover_a_share_of_tokens(agreement: float) -> None:
    """200 samples of five tokens that are read together or not: tokens are no independent observations."""
    rng, covered = np.random.default_rng([5, int(10 * agreement)]), []
    samples = np.repeat(np.arange(200), 5)
    for _ in range(300):
        together = rng.random(200) < 0.6
        tokens = np.where(rng.random((200, 5)) < agreement, together[:, None], rng.random((200, 5)) < 0.6)
        low, high = mean_interval(tokens.reshape(-1).astype(float), 0, samples, 500)
        covered.append(bool(low <= 0.6 <= high))
    assert 0.90 <= np.mean(covered) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.5, 0.9, 0.98, 0.995])
def test_wilsons_intervals_cover_shares_near_one(p: float) -> None:
    right = (np.random.default_rng(int(1000 * p)).random((100, 4000)) < p).astype(float)
    low, high = share_interval(right)
    assert ((low <= p) & (p <= high)).mean() >= 0.90
