"""Regression of the target on the mask: the contribution of each head or image token (arXiv 2509.17588).

value(mask) = intercept + sum of the coefficients of the parts that are kept
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.linalg import cho_solve
from sklearn.linear_model import Lasso, LassoCV, LinearRegression, Ridge, RidgeCV

from hooked_vlm.experiments.head_attribution.coefficient_intervals import factor, sandwich_interval
from hooked_vlm.experiments.head_attribution.config import Regression, n_held_out

PENALTIES = np.logspace(-3, 3, 13)
RELIABLE = 0.95
"""Coefficients count as reliable where those of two disjoint sets of masks correlate by at least this."""

Masks = Bool[np.ndarray, "mask part"]
Values = Float[np.ndarray, "mask"]
Coefficients = Float[np.ndarray, "part"]


@dataclass(frozen=True, eq=False)
class Fit:
    """Regression coefficients, and the accuracy of predictions for held-out masks."""

    coefficients: Coefficients
    low: Coefficients
    high: Coefficients
    """95% interval over masks; NaN where these do not determine the coefficients."""
    intercept: float
    pearson: float
    """Pearson correlation of predicted and measured values of held-out masks; NaN where these are constant."""
    r2: float
    n_train: int
    n_held_out: int
    penalty: float
    """Of ridge or lasso; 0 for least squares."""


def fit(kept: Masks, values: Values, kind: Regression, held_out: float, draws: int, seed: int, group: int = 1) -> Fit:
    """Fit all but the last masks, and predict those.

    Args:
        draws: bootstrap resamples of the lasso's intervals; the others' are `sandwich_interval`.
        group: number of consecutive masks that were drawn together (`masks.PAIRED`).
    """
    n_held = n_held_out(len(values), held_out)
    train, test = slice(None, -n_held), slice(-n_held, None)
    x, y = kept[train].astype(float), values[train]
    model = chosen(kind, x, y)
    found = model.fit(x, y)
    coefficients, penalty = found.coef_.copy(), float(getattr(model, "alpha", 0.0))
    pearson, r2 = accuracy(found.predict(kept[test].astype(float)), values[test])
    intercept = float(found.intercept_)
    low, high = bootstrap(model, x, y, draws, seed) if kind == "lasso" else sandwich_interval(x, y, penalty, group)
    return Fit(coefficients, low, high, intercept, pearson, r2, len(y), n_held, penalty)


def chosen(kind: Regression, x: Float[np.ndarray, "mask part"], y: Values) -> Any:
    """Regression model of a kind; the penalty is chosen by cross-validation on these masks."""
    if kind == "ols":
        return LinearRegression()
    if kind == "ridge":
        by_validation: Any = RidgeCV(alphas=PENALTIES).fit(x, y)
        return Ridge(alpha=float(by_validation.alpha_))
    by_validation = LassoCV(cv=5, random_state=0).fit(x, y)
    return Lasso(alpha=float(by_validation.alpha_), max_iter=10000)


def accuracy(predicted: Values, measured: Values) -> tuple[float, float]:
    """Pearson correlation and R² of predictions; NaN where the measured values are constant."""
    spread = measured - measured.mean()
    if not spread.any():
        return np.nan, np.nan
    pearson = np.corrcoef(predicted, measured)[0, 1] if predicted.std() else np.nan
    return float(pearson), float(1 - ((measured - predicted) ** 2).sum() / (spread**2).sum())


def bootstrap(
    model: Lasso, x: Float[np.ndarray, "mask part"], y: Values, draws: int, seed: int
) -> tuple[Coefficients, Coefficients]:
    """95% percentile bootstrap intervals of the lasso's coefficients, resampling masks at the same penalty."""
    rng = np.random.default_rng([seed, 12])
    n = len(y)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    found = [model.fit(x, y, sample_weight=own).coef_.copy() for own in counts]
    low, high = np.percentile(found, [2.5, 97.5], axis=0)
    return low, high


def convergence(
    kept: Masks, values: Values, kind: Regression, held_out: float, penalty: float, group: int = 1, steps: int = 8
) -> pd.DataFrame:
    """Reliability of the coefficients by number of masks.

    One row per number of masks `n`, up to half of all: `reliability`, the correlation between coefficients from `n`
    masks and from `n` others, and held-out `r2` and `pearson` after `n`. The penalty is that of the fit to all masks.
    Gram matrices grow from size to size, so that all of them together cost as much as one.
    """
    n_held = n_held_out(len(values), held_out)
    x, y = kept[:-n_held].astype(float), values[:-n_held]
    most = len(y) // 2 // group * group
    fewest = min(round(1.5 * x.shape[1]), most)
    sizes = np.unique(np.geomspace(fewest, most, steps).round().astype(int) // group * group).tolist()
    sums = sums_of(x, y, sorted({0, *sizes, *(2 * n for n in sizes)}))
    held, measured = kept[-n_held:].astype(float), values[-n_held:]
    rows: list[dict[str, float]] = []
    for n in sizes:
        both: np.ndarray
        halves = (slice(0, n), slice(n, 2 * n))
        if kind == "lasso":
            fits = [Lasso(alpha=penalty, max_iter=10000).fit(x[half], y[half]) for half in halves]
            both, intercept = np.stack([fit.coef_ for fit in fits]), float(fits[0].intercept_)
        else:
            both = np.stack([solved(sums[half.stop] - sums[half.start], penalty) for half in halves])
            intercept = float(y[:n].mean() - x[:n].mean(0) @ both[0])
        reliability = float(np.corrcoef(*both)[0, 1]) if (both.std(1) > 0).all() else np.nan
        pearson, r2 = accuracy(held @ both[0] + intercept, measured)
        rows.append({"n": n, "reliability": reliability, "pearson": pearson, "r2": r2})
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class MaskSums:
    """Sums over masks from which least squares follow."""

    n: int
    x: Float[np.ndarray, "part"]
    y: float
    xx: Float[np.ndarray, "part part"]
    xy: Float[np.ndarray, "part"]

    def __sub__(self, other: "MaskSums") -> "MaskSums":
        return MaskSums(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def sums_of(x: Float[np.ndarray, "mask part"], y: Values, ends: list[int]) -> dict[int, MaskSums]:
    """Sums over the first masks, up to each of `ends`, of which the first is 0."""
    parts = x.shape[1]
    found = {0: MaskSums(0, np.zeros(parts), 0.0, np.zeros((parts, parts)), np.zeros(parts))}
    for start, stop in pairwise(ends):
        a, b, before = x[start:stop], y[start:stop], found[start]
        found[stop] = MaskSums(
            stop, before.x + a.sum(0), before.y + float(b.sum()), before.xx + a.T @ a, before.xy + a.T @ b
        )
    return found


def solved(sums: MaskSums, penalty: float) -> Coefficients:
    """Least squares with an unpenalised intercept; the shortest solution where there are several."""
    mean = sums.x / sums.n
    gram, right = sums.xx - np.outer(mean, sums.x), sums.xy - mean * sums.y
    lower = factor(gram, penalty)
    if lower is None:
        return np.linalg.lstsq(gram + penalty * np.eye(len(gram)), right, rcond=None)[0]
    return cho_solve((lower, True), right, check_finite=False)


def settled_at(curve: pd.DataFrame) -> float:
    """Number of masks from which on the coefficients are reliable; NaN if there are too few masks."""
    reliable = (curve["reliability"] >= RELIABLE).to_numpy()
    if not reliable[-1]:
        return np.nan
    return float(curve["n"].iloc[len(reliable) - int(np.argmin(reliable[::-1])) if not reliable.all() else 0])
