"""Similarity of OCR and retrieval heads: against chance, and against the same heads measured twice.

A similarity alone says little. Heads that read and heads that retrieve both live in some layers, so heads placed at
random must be placed within layers; and scores are means over samples, so a set of heads is not even identical to
itself in other samples. The claim of the paper is that the two kinds are *different*, so that is tested too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from scipy import stats
from scipy.spatial.distance import jensenshannon

from hooked_vlm.analysis.statistics import Estimate, half_sampling

Scored = Float[np.ndarray, "sample layer head"]
Other = Float[np.ndarray, "other layer head"]
"""Samples of the other kind, of another number."""
HALVES = 200
"""Random halves of the samples."""


def mean_scores(samples: Scored) -> Float[np.ndarray, "layer head"]:
    return samples.mean(0)


@dataclass(frozen=True)
class Measure:
    """A similarity, or a distance, of two scorings of the same heads."""

    name: str
    of: Callable[[np.ndarray, np.ndarray], float]
    """Function of both kinds' [layer, head] values; NaN where it is undefined."""
    values: Callable[[Scored], np.ndarray] = mean_scores
    """[layer, head] values of some samples."""
    distance: bool = False
    """Smaller is more similar."""
    limits: tuple[float, float] = (0.0, 1.0)
    by_head: bool = True
    """It depends on which head has which value, so that exchanging heads is a test."""


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard index of two sets, given as one boolean per head; NaN if both are empty."""
    together = (a | b).sum()
    return float((a & b).sum() / together) if together else np.nan


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two scores of each head; NaN if either is constant."""
    if not np.ptp(a) or not np.ptp(b):
        return np.nan
    ranks = [stats.rankdata(x.ravel()) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def shannon(a: np.ndarray, b: np.ndarray) -> float:
    """Jensen-Shannon distance (base 2) of two distributions of score over heads; NaN if either has none."""
    if not a.sum() or not b.sum():
        return np.nan
    with np.errstate(invalid="ignore"):  # equal distributions: rounding may leave a root of less than zero
        return float(np.nan_to_num(jensenshannon(a.ravel(), b.ravel(), base=2)))


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """Wasserstein distance of two distributions of scores, whichever heads have them."""
    return float(stats.wasserstein_distance(a.ravel(), b.ravel()))


def measures(threshold: float) -> list[Measure]:
    """Measures of the paper's comparison; a head is in a set if its mean score is above `threshold`."""
    return [
        Measure(f"Jaccard, score > {threshold:g}", lambda a, b: jaccard(a > threshold, b > threshold)),
        Measure("Spearman", spearman, limits=(-1.0, 1.0)),
        Measure("Jensen-Shannon distance", shannon, distance=True),
        Measure("Wasserstein distance of scores", wasserstein, distance=True, by_head=False),
    ]


def compare_scores(compared: Sequence[Measure], a: Scored, b: Other, seed: int, draws: int) -> pd.DataFrame:
    """Compare two scorings of the same heads, each by its samples, one row per measure.

    Columns: `value` with `low` and `high` (95%, over samples); `chance`, its mean where one kind's values are permuted
    over the heads of each layer, with one-sided p of being more (`p more`) or less (`p less`) similar than that;
    `halves`, the mean over random halves of either kind's samples, and `same heads`, that of two halves of one kind
    (the noise ceiling; mean of both kinds); `p different`, one-sided: the share of random exchanges of samples between
    the kinds that leave them at least as different, under the hypothesis that both have the same scores.
    """
    halves, same = noise_ceiling(compared, a, b, seed)
    different = different_p(compared, a, b, seed, draws)
    rows = []
    for i, measure in enumerate(compared):
        found = over_samples(measure, a, b, seed)
        chance, more, less = against_chance(measure, measure.values(a), measure.values(b), seed, draws)
        rows.append(
            {"measure": measure.name, "value": found.value, "low": found.low, "high": found.high}
            | {"chance": chance, "p more": more, "p less": less}
            | {"halves": halves[i], "same heads": same[i], "p different": different[i]}
        )
    return pd.DataFrame(rows)


def over_samples(measure: Measure, a: Scored, b: Other, seed: int) -> Estimate:
    """A measure with its 95% interval over the samples of both kinds."""
    found = half_sampling(partial(_of_samples, measure), a, b, seed=seed, draws=HALVES)
    low, high = np.clip([found.low, found.high], *measure.limits)
    return Estimate(found.value, float(low), float(high), found.n)


def against_chance(
    measure: Measure, a: Shaped[np.ndarray, "layer head"], b: Shaped[np.ndarray, "layer head"], seed: int, draws: int
) -> tuple[float, float, float]:
    """Permute one kind's values over the heads of each layer.

    Returns:
        (mean, one-sided p of being at least as similar, one-sided p of being at most as similar); NaN where the measure
        is undefined or ignores which head has which value.
    """
    observed = measure.of(a, b)
    if np.isnan(observed) or not measure.by_head:
        return np.nan, np.nan, np.nan
    rng = np.random.default_rng([seed, 15])
    drawn = np.array([measure.of(a, rng.permuted(b, axis=1)) for _ in range(draws)])
    return _mean(drawn), *_tails(observed, drawn, measure.distance)


def noise_ceiling(
    compared: Sequence[Measure], a: Scored, b: Other, seed: int, draws: int = HALVES
) -> tuple[list[float], list[float]]:
    """Each measure of both kinds in halves of their samples, and of one kind with itself in its other half."""
    rng = np.random.default_rng([seed, 17])
    across, within = [], []
    for _ in range(draws):
        (a1, a2), (b1, b2) = ([_values(compared, half) for half in _halves(x, rng)] for x in (a, b))
        across.append([measure.of(x, y) for measure, x, y in zip(compared, a1, b1, strict=True)])
        for one, other in ((a1, a2), (b1, b2)):
            within.append([measure.of(x, y) for measure, x, y in zip(compared, one, other, strict=True)])
    return [_mean(x) for x in np.transpose(across)], [_mean(x) for x in np.transpose(within)]


def different_p(compared: Sequence[Measure], a: Scored, b: Other, seed: int, draws: int) -> list[float]:
    """One-sided p, for each measure, of the hypothesis that samples of both kinds give every head the same scores."""
    rng, pooled = np.random.default_rng([seed, 18]), np.concatenate([a, b])
    drawn = np.empty((draws, len(compared)))
    for i in range(draws):
        order = rng.permutation(len(pooled))
        one, other = (_values(compared, pooled[own]) for own in (order[: len(a)], order[len(a) :]))
        drawn[i] = [measure.of(x, y) for measure, x, y in zip(compared, one, other, strict=True)]
    observed = [_of_samples(measure, a, b) for measure in compared]
    return [
        np.nan if np.isnan(value) else _tails(value, drawn[:, i], compared[i].distance)[1]
        for i, value in enumerate(observed)
    ]


def _of_samples(measure: Measure, a: Scored, b: Other) -> float:
    return measure.of(measure.values(a), measure.values(b))


def _values(compared: Sequence[Measure], samples: Scored) -> list[np.ndarray]:
    """Values that each measure compares; those that several need are computed once."""
    found = {values: values(samples) for values in dict.fromkeys(measure.values for measure in compared)}
    return [found[measure.values] for measure in compared]


def _tails(observed: float, drawn: Float[np.ndarray, "draw"], distance: bool) -> tuple[float, float]:
    """p of being at least, and of being at most as similar as `observed`."""
    known = drawn[~np.isnan(drawn)]
    high, low = (known >= observed - 1e-12).sum(), (known <= observed + 1e-12).sum()
    more, less = (low, high) if distance else (high, low)
    return float((more + 1) / (len(known) + 1)), float((less + 1) / (len(known) + 1))


def _halves(samples: Scored, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    order = rng.permutation(len(samples))
    return samples[order[: len(order) // 2]], samples[order[len(order) // 2 :]]


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan
