"""How well a direction separates two sets of items that it was not fitted on: area under the ROC curve."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import optimize, stats

from hooked_vlm.analysis.multiple_testing import holm
from hooked_vlm.analysis.statistics import Z

EXACT = 10_000
"""Pairs of units up to which the permutation distribution is enumerated; beyond, its normal limit is used."""

Scores = Float[np.ndarray, "unit layer"]


def area(positive: Float[np.ndarray, "ours"], negative: Float[np.ndarray, "theirs"]) -> float:
    """Probability that a positive unit scores above a negative one, a tie counting half (AUC)."""
    u = stats.mannwhitneyu(positive, negative, method="asymptotic").statistic
    return float(u) / (len(positive) * len(negative))


def area_p(positive: Float[np.ndarray, "ours"], negative: Float[np.ndarray, "theirs"]) -> float:
    """One-sided p that the labels say nothing of the scores, against positive units scoring higher.

    The null distribution is that of the AUC over all permutations of labels (Mann and Whitney 1947): exact without ties
    and up to `EXACT` pairs, so never below one over the number of permutations.
    """
    tied = len(np.unique(np.concatenate((positive, negative)))) < len(positive) + len(negative)
    method = "asymptotic" if tied or len(positive) * len(negative) > EXACT else "exact"
    return float(stats.mannwhitneyu(positive, negative, alternative="greater", method=method).pvalue)


def area_interval(auc: float, n_positive: int, n_negative: int) -> tuple[float, float]:
    """95% score interval of an AUC (Newcombe 2006, method 5).

    Its ends are the areas whose own standard error, by Hanley and McNeil's (1982) formula with equal sizes in its
    bracket, puts the observed area 1.96 of them away. Like Wilson's interval of a share it has a width at 0 and 1.
    """
    mean_size = (n_positive + n_negative) / 2 - 1

    def excess(true: float) -> float:
        bracket = 1 + mean_size * ((1 - true) / (2 - true) + true / (1 + true))
        variance = true * (1 - true) * bracket / (n_positive * n_negative)
        return (auc - true) ** 2 - Z**2 * variance

    inside = min(max(auc, 1e-9), 1 - 1e-9)  # an area of 0 or 1 is itself a root, of no width
    low = 0.0 if auc <= 0 else optimize.brentq(excess, 0.0, inside)
    high = 1.0 if auc >= 1 else optimize.brentq(excess, inside, 1.0)
    return float(low), float(high)  # pyright: ignore[reportArgumentType] (brentq is not annotated)


def distance(positive: Float[np.ndarray, "ours"], negative: Float[np.ndarray, "theirs"]) -> float:
    """Difference of mean scores in pooled standard deviations; NaN for sets that do not vary."""
    n = len(positive) + len(negative) - 2
    pooled = ((len(positive) - 1) * positive.var(ddof=1) + (len(negative) - 1) * negative.var(ddof=1)) / n
    return float((positive.mean() - negative.mean()) / np.sqrt(pooled)) if pooled > 0 else np.nan


def separability_of(
    positive: Float[np.ndarray, "ours layer"], negative: Float[np.ndarray, "theirs layer"], layers: Sequence[int]
) -> pd.DataFrame:
    """One row per layer: AUC with its 95% interval, distance, one-sided p, p adjusted over the layers (Holm), and
    numbers of units.

    Args:
        positive, negative: projections of held-out units on each layer's direction; two units each, at least.
    """
    rows = []
    for column, layer in enumerate(layers):
        ours, theirs = positive[:, column], negative[:, column]
        auc = area(ours, theirs)
        low, high = area_interval(auc, len(ours), len(theirs))
        rows.append(
            {
                "layer": layer, "AUC": auc, "low": low, "high": high, "distance": distance(ours, theirs),
                "p": area_p(ours, theirs),
            }
        )  # fmt: skip
    frame = pd.DataFrame(rows)
    sizes = {"n positive": len(positive), "n negative": len(negative)}
    return frame.assign(**{"p, adjusted": holm(frame["p"].to_numpy())}, **sizes)


def unit_means(
    values: Float[np.ndarray, "item layer"], units: Sequence[str], among: Bool[np.ndarray, "item"]
) -> Scores:
    """Mean over the items of each unit, of the items marked; units in order of their first item."""
    names = np.array(units)[among]
    own = values[among]
    return np.stack([own[names == name].mean(0) for name in dict.fromkeys(names.tolist())])
