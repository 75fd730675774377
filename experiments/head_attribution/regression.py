"""Regression of the target on the mask: the contribution of each head or image token (arXiv 2509.17588).

value(mask) = intercept + sum of the coefficients of the parts that are kept
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from sklearn.linear_model import Lasso, LassoCV, LinearRegression, Ridge, RidgeCV

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
    """95% bootstrap interval over masks."""
    intercept: float
    pearson: float
    """Pearson correlation of predicted and measured values of held-out masks; NaN where these are constant."""
    r2: float
    n_train: int
    n_held_out: int


def fit(kept: Masks, values: Values, kind: Regression, held_out: float, draws: int, seed: int) -> Fit:
    """Fit all but the last masks, and predict those."""
    n_held = n_held_out(len(values), held_out)
    train, test = slice(None, -n_held), slice(-n_held, None)
    x, y = kept[train].astype(float), values[train]
    model = chosen(kind, x, y)
    found = model.fit(x, y)
    low, high = bootstrap(model, x, y, draws, seed)
    pearson, r2 = accuracy(found.predict(kept[test].astype(float)), values[test])
    return Fit(found.coef_, low, high, float(found.intercept_), pearson, r2, len(y), n_held)


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
    model: Any, x: Float[np.ndarray, "mask part"], y: Values, draws: int, seed: int
) -> tuple[Coefficients, Coefficients]:
    """95% percentile bootstrap intervals of the coefficients, resampling masks."""
    rng = np.random.default_rng([seed, 12])
    n = len(y)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    if isinstance(model, Lasso):
        found = [model.fit(x, y, sample_weight=own).coef_.copy() for own in counts]
    else:
        penalty = model.alpha if isinstance(model, Ridge) else 0.0
        found = [least_squares(x, y, own, penalty) for own in counts]
    low, high = np.percentile(found, [2.5, 97.5], axis=0)
    return low, high


def least_squares(x: Float[np.ndarray, "mask part"], y: Values, weights: Values, penalty: float) -> Coefficients:
    """Weighted least squares with an unpenalised intercept.

    Equals scikit-learn's, without its input checks, which dominate the time of thousands of small regressions.
    """
    with_intercept = np.column_stack((x, np.ones(len(x))))
    gram = with_intercept.T @ (weights[:, None] * with_intercept)
    gram[np.arange(x.shape[1]), np.arange(x.shape[1])] += penalty
    return np.linalg.lstsq(gram, with_intercept.T @ (weights * y), rcond=None)[0][:-1]


def convergence(kept: Masks, values: Values, kind: Regression, held_out: float, steps: int = 8) -> pd.DataFrame:
    """Reliability of the coefficients by number of masks.

    One row per number of masks `n`, up to half of all: `reliability`, the correlation between coefficients from `n`
    masks and from `n` others, and held-out `r2` and `pearson` after `n`.
    """
    n_held = n_held_out(len(values), held_out)
    x, y = kept[:-n_held].astype(float), values[:-n_held]
    n_parts, most = x.shape[1], len(y) // 2
    fewest = min(round(1.5 * n_parts), most)
    sizes = np.unique(np.geomspace(fewest, most, steps).round().astype(int))
    rows = []
    for n in sizes.tolist():
        first = chosen(kind, x[:n], y[:n]).fit(x[:n], y[:n])
        second = chosen(kind, x[n : 2 * n], y[n : 2 * n]).fit(x[n : 2 * n], y[n : 2 * n])
        both = np.stack([first.coef_, second.coef_])
        reliability = float(np.corrcoef(both)[0, 1]) if (both.std(1) > 0).all() else np.nan
        pearson, r2 = accuracy(first.predict(kept[-n_held:].astype(float)), values[-n_held:])
        rows.append({"n": n, "reliability": reliability, "pearson": pearson, "r2": r2})
    return pd.DataFrame(rows)


def settled_at(curve: pd.DataFrame) -> float:
    """Number of masks from which on the coefficients are reliable; NaN if there are too few masks."""
    reliable = (curve["reliability"] >= RELIABLE).to_numpy()
    if not reliable[-1]:
        return np.nan
    return float(curve["n"].iloc[len(reliable) - int(np.argmin(reliable[::-1])) if not reliable.all() else 0])
