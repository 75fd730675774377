"""Numbers with intervals, tests against random draws, paired tests.

`scipy.stats.permutation_test` samples where `paired_p` is exact, having left out differences of zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats

DRAWS = 2000
"""Resamples of a bootstrap and permutations of a test, by default."""
Z = float(stats.norm.ppf(0.975))
"""Half the width of a 95% interval, in standard errors."""


@dataclass(frozen=True)
class Estimate:
    """A number, its 95% interval, and its number of observations."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f}, n={self.n})"


def share(right: int, n: int) -> Estimate:
    """A proportion with its score interval (Wilson 1927)."""
    low, high = stats.binomtest(right, n).proportion_ci(method="wilson")
    return Estimate(right / n, float(low), float(high), n)


def score_interval(
    values: Float[np.ndarray, "n *dims"], groups: Shaped[np.ndarray, "n"] | None = None
) -> tuple[Float[np.ndarray, "*dims"], Float[np.ndarray, "*dims"]]:
    """95% intervals of means of values in [0, 1], over the first axis.

    Wilson's interval (1927) for the number of independent 0/1 values that would have the variance observed,
    mean (1 - mean) / variance; values that are all 0 or 1 give Wilson's own. Unlike a bootstrap interval it has a
    width where all values are 0 or 1: coverage stays near 95% for shares near either end. A variance that rests on few
    values away from the nearer end is itself unsure, so it is averaged with the largest that values in [0, 1] can have,
    that of 0/1 values, which counts as one such value.

    Args:
        groups: the group of each entry (tokens of a sample), whose entries depend on each other: the variance is that
            of sums over groups. Entries are independent by default.

    Raises:
        ValueError: a value is outside of [0, 1].
    """
    if values.size and not (np.min(values) >= 0 and np.max(values) <= 1):
        raise ValueError(f"a score interval needs values in [0, 1], got {np.min(values):g} to {np.max(values):g}")
    mean = values.mean(0)
    residuals = group_sums(values - mean, groups)
    n = len(residuals)
    largest, away = mean * (1 - mean) / n, n * np.minimum(mean, 1 - mean)
    variance = ((residuals**2).sum(0) / len(values) ** 2 * away + largest) / (away + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = np.where(variance > 1e-18, mean * (1 - mean) / variance, n)
    shrink = 1 + Z**2 / effective
    centre = (mean + Z**2 / (2 * effective)) / shrink
    half = Z / shrink * np.sqrt(mean * (1 - mean) / effective + Z**2 / (4 * effective**2))
    return np.asarray(np.clip(centre - half, 0, mean)), np.asarray(np.clip(centre + half, mean, 1))


def group_sums(
    values: Float[np.ndarray, "n *dims"], groups: Shaped[np.ndarray, "n"] | None
) -> Float[np.ndarray, "group *dims"]:
    """Sums over the entries of each group; the entries themselves without groups."""
    if groups is None:
        return values
    _, index = np.unique(groups, return_inverse=True)
    return np.tensordot(np.eye(int(index.max()) + 1)[:, index], values, 1)


def mean_score(values: Float[np.ndarray, "n"]) -> Estimate:
    """A mean of values in [0, 1] with its `score_interval`."""
    low, high = score_interval(np.asarray(values, dtype=float))
    return Estimate(float(np.mean(values)), float(low), float(high), len(values))


def paired_change(before: Float[np.ndarray, "n"], after: Float[np.ndarray, "n"]) -> Estimate:
    """Mean change of paired values in [0, 1] with its 95% interval: Wald's for the changes and two more, one of -1 and
    one of 1 (Bonett and Price 2012, for 0/1 values), so that few changes, or none, do not give a width of zero."""
    change = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    widened = np.append(change, [-1.0, 1.0])
    half = Z * widened.std() / np.sqrt(len(widened))
    low, high = max(-1.0, widened.mean() - half), min(1.0, widened.mean() + half)
    return Estimate(float(change.mean()), min(low, float(change.mean())), max(high, float(change.mean())), len(change))


def bootstrap_two_way(values: Float[np.ndarray, "draw sample"], seed: int, draws: int = DRAWS) -> Estimate:
    """Mean of a table with its 95% interval: rows (random draws) and columns (samples) are both resampled, since both
    were drawn (Owen 2007). `n` counts samples; a single row is not resampled."""
    n_rows, n = values.shape
    rng = np.random.default_rng([seed, 10])
    rows = rng.multinomial(n_rows, np.full(n_rows, 1 / n_rows), size=draws) / n_rows
    columns = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n
    means = ((rows @ values) * columns).sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), n)


def rank_p(observed: float, drawn: Float[np.ndarray, "draw"], tail: Literal["lower", "higher"]) -> float:
    """One-sided p of the hypothesis that `observed` is one more random draw: the share of draws, with itself, that are
    as low (as high). The draws must be distinct; the smallest p that n of them allow is 1 / (n + 1)."""
    sign = 1 if tail == "lower" else -1
    as_far = sign * np.asarray(drawn) <= sign * observed + 1e-12
    return float((as_far.sum() + 1) / (len(drawn) + 1))


def half_sampling(
    statistic: Callable[..., float], *samples: Shaped[np.ndarray, "_ ..."], seed: int, draws: int = 200
) -> Estimate:
    """A statistic of independent samples with its 95% interval from random halves of each (Shao and Wu 1989).

    A half drawn without replacement scatters around the statistic as the statistic does around its expectation. Unlike
    resamples with replacement, halves hold no entry twice, which biases measures of agreement. `n` is the size of the
    smallest sample; the ends are NaN below 4.
    """
    value, n = float(statistic(*samples)), min(map(len, samples))
    rng = np.random.default_rng([seed, 11])
    drawn = []
    for _ in range(draws if n >= 4 else 0):
        drawn.append(statistic(*(x[rng.permutation(len(x))[: len(x) // 2]] for x in samples)))
    known = np.array(drawn)[~np.isnan(drawn)]
    half = Z * known.std() if len(known) > 1 else np.nan
    return Estimate(value, value - half, value + half, n)


def paired_p(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"], seed: int, draws: int = DRAWS) -> float:
    """Two-sided p of the hypothesis that paired observations have the same mean, by flipping signs of differences.

    Exact where there are at most `draws` ways to flip them.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    difference = difference[~np.isnan(difference)]
    changed = difference[difference != 0]  # others are the same under every flip
    if not len(changed):
        return 1.0
    if 2 ** len(changed) <= draws:
        signs = 1 - 2 * ((np.arange(2 ** len(changed))[:, None] >> np.arange(len(changed))) & 1)
        return float((np.abs(signs @ changed) >= abs(changed.sum()) - 1e-12).mean())
    signs = 1 - 2 * np.random.default_rng([seed, 7]).integers(2, size=(draws, len(changed)))
    as_far = np.abs(signs @ changed) >= abs(changed.sum()) - 1e-12
    return float((as_far.sum() + 1) / (draws + 1))
