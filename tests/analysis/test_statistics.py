"""Intervals and tests: known values, and the rates they promise on data made for it."""

import numpy as np
import pytest
from scipy import stats

from hooked_vlm.analysis.statistics import bootstrap, bootstrap_mean, bootstrap_means, paired_p, permutation_p, share


def test_share_is_wilsons_interval() -> None:
    found = share(8, 10)  # by hand: (0.8 + z²/20 ± z sqrt(0.016 + z²/400)) / (1 + z²/10)
    assert (found.value, found.n) == (0.8, 10)
    assert found.low == pytest.approx(0.4901625, abs=1e-6)
    assert found.high == pytest.approx(0.9433178, abs=1e-6)
    assert share(0, 5).low == 0.0
    assert share(5, 5).high == 1.0


def test_intervals_of_a_mean_cover_it_at_their_rate() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(3, 2, size=(300, 60))
    covered = np.mean([(e := bootstrap_mean(s, seed=1)).low <= 3 <= e.high for s in samples])
    assert 0.89 <= covered <= 0.98


def test_means_of_many_at_once_are_those_of_each() -> None:
    values = np.random.default_rng(0).random((20, 3, 2))
    low, high = bootstrap_means(values, seed=4)
    one = bootstrap_mean(values[:, 2, 1], seed=4)
    assert (low[2, 1], high[2, 1]) == pytest.approx((one.low, one.high))


def test_missing_observations_are_left_out_and_counted() -> None:
    found = bootstrap_mean(np.array([1.0, np.nan, 3.0]), seed=0)
    assert (found.value, found.n) == (2.0, 2)
    assert np.isnan(bootstrap_mean(np.array([np.nan]), seed=0).value)


def test_bootstrap_of_a_correlation_agrees_with_fishers_interval() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    y = x + rng.normal(size=200)
    found = bootstrap(lambda a, b: float(np.corrcoef(a, b)[0, 1]), x, y, seed=0)
    low, high = stats.pearsonr(x, y).confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)


@pytest.mark.parametrize("n", [6, 40])
def test_paired_p_agrees_with_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.random(n), rng.random(n) + 0.15
    reference = stats.permutation_test((a, b), lambda x, y: np.mean(x - y), permutation_type="samples", rng=0)
    assert paired_p(a, b, seed=0) == pytest.approx(reference.pvalue, abs=0.02)
    assert paired_p(a, a, seed=0) == 1.0


def test_permutation_p_finds_a_difference_and_is_uniform_without_one() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 30)

    def gap(x: np.ndarray) -> float:
        return float(x[labels == 1].mean() - x[labels == 0].mean())

    shifted = rng.normal(size=60) + labels
    assert permutation_p(gap, lambda r: r.permutation(shifted), gap(shifted), seed=0) < 0.01
    ps = []
    for trial in range(60):
        x = rng.normal(size=60)
        ps.append(permutation_p(gap, lambda r, x=x: r.permutation(x), gap(x), seed=trial, draws=200))
    assert stats.kstest(ps, "uniform").pvalue > 0.01


def test_one_observation_has_no_interval() -> None:
    found = bootstrap_mean(np.array([3.0]), seed=0)
    assert found.value == 3.0 and np.isnan([found.low, found.high]).all() and found.n == 1
