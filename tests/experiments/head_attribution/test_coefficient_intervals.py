"""Intervals of coefficients: against literal leaving out, the pairs bootstrap, and planted coefficients."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression, Ridge

from hooked_vlm.experiments.head_attribution.coefficient_intervals import sandwich_interval
from hooked_vlm.experiments.head_attribution.masks import PAIRED, draw_masks
from hooked_vlm.experiments.head_attribution.regression import fit


def case(rng: np.random.Generator, n: int = 60, parts: int = 6) -> tuple[np.ndarray, np.ndarray]:
    x = (rng.random((n, parts)) < 0.5).astype(float)
    return x, x @ rng.normal(size=parts) + (0.3 + 2 * x[:, 0]) * rng.normal(size=n)


@pytest.mark.parametrize("penalty", [0.0, 2.0])
@pytest.mark.parametrize(("group", "n"), [(1, 60), (2, 60), (2, 61)])
def test_width_is_that_of_literally_leaving_masks_out(penalty: float, group: int, n: int) -> None:
    x, y = case(np.random.default_rng(0), n)
    model: Any = Ridge(alpha=penalty) if penalty else LinearRegression()
    whole = model.fit(x, y).coef_.copy()
    edges = [*range(0, n // group * group, group), *range(n // group * group, n), n]
    changes = []
    for start, stop in pairwise(edges):
        rest = np.delete(np.arange(n), np.arange(start, stop))
        changes.append(whole - model.fit(x[rest], y[rest]).coef_)
    low, high = sandwich_interval(x, y, penalty, group)
    np.testing.assert_allclose((low + high) / 2, whole)
    hat = np.column_stack((x - x.mean(0), np.ones(n)))
    inner = hat.T @ hat + np.diag([penalty] * x.shape[1] + [0])
    reach = stats.t.ppf(0.975, n - np.trace(hat @ np.linalg.solve(inner, hat.T)))
    np.testing.assert_allclose((high - low) / 2, reach * np.sqrt((np.stack(changes) ** 2).sum(0)))


def test_width_agrees_with_the_pairs_bootstrap() -> None:
    rng = np.random.default_rng(1)
    x, y = case(rng, n=2000)
    drawn = []
    for _ in range(400):
        chosen = rng.integers(2000, size=2000)
        drawn.append(LinearRegression().fit(x[chosen], y[chosen]).coef_)
    low, high = sandwich_interval(x, y, 0.0, 1)
    np.testing.assert_allclose(high - low, np.subtract(*np.percentile(drawn, [97.5, 2.5], axis=0)), rtol=0.15)


def test_masks_that_do_not_determine_coefficients_give_no_interval() -> None:
    x, y = case(np.random.default_rng(2), n=20)
    x[:, 1] = x[:, 0]
    assert np.isnan(sandwich_interval(x, y, 0.0, 1)).all()
    assert np.isfinite(sandwich_interval(x, y, 1.0, 1)).all()
    few = np.random.default_rng(3).random((5, 6))
    assert np.isnan(sandwich_interval(few, few.sum(1), 0.0, 1)).all()


# ---------------------------------------------------------------- coverage


def noise_free(kept: np.ndarray, true: np.ndarray, pairs: float) -> np.ndarray:
    """Linear in the masks, and products of two heads, whose share at keep 0.5 is spread over both heads."""
    signs = kept - 0.5
    return kept @ true + pairs * (signs[:, :-1] * signs[:, 1:]).sum(1)


def covered(
    design: Any, regression: Any, n: int, repeats: int, noise: float, uneven: float, pairs: float, heads: int = 16
) -> list[bool]:
    found = []
    for repeat in range(repeats):
        rng = np.random.default_rng([repeat, n])
        true = rng.normal(size=heads)
        held = max(2, round(0.1 * n))
        kept = draw_masks(design, n, held, heads, 0.5, [repeat, n])
        spread = noise * (1 + uneven * kept[:, 0])
        values = 3 + noise_free(kept, true, pairs) + spread * rng.normal(size=n)
        own = fit(kept, values, regression, 0.1, 100, seed=repeat, group=PAIRED[design])
        found += ((own.low <= true) & (true <= own.high)).tolist()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("n", "heads"), [(96, 16), (320, 16), (500, 100)])
@pytest.mark.parametrize(("uneven", "pairs"), [(0.0, 0.0), (4.0, 0.0), (0.0, 2.0)])
def test_intervals_of_least_squares_cover_planted_coefficients(n: int, heads: int, uneven: float, pairs: float) -> None:
    """Noise of even or uneven size, and none but what is not linear."""
    noise = 0.0 if pairs else 1.0
    assert 0.90 <= np.mean(covered("random", "ols", n, 3000 // heads, noise, uneven, pairs, heads)) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("design", PAIRED)
@pytest.mark.parametrize(("noise", "pairs"), [(1.0, 0.0), (0.5, 2.0)])
def test_intervals_cover_planted_coefficients_in_every_design(design: str, noise: float, pairs: float) -> None:
    assert 0.90 <= np.mean(covered(design, "ols", 320, 200, noise, 1.0, pairs)) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("regression", "repeats"), [("ridge", 60), ("lasso", 12)])
def test_intervals_of_penalised_coefficients_cover_planted_ones(regression: str, repeats: int) -> None:
    assert 0.90 <= np.mean(covered("random", regression, 320, repeats, 1.0, 1.0, 0.0)) <= 0.98
