"""Random masks and the regressions over them, against scikit-learn and known coefficients."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.linear_model import Lasso, LinearRegression, Ridge

from hooked_vlm.experiments.head_attribution import Attribute
from hooked_vlm.experiments.head_attribution.config import BLOCK, n_masks
from hooked_vlm.experiments.head_attribution.masks import as_frame, draw_masks, from_frame, random_masks
from hooked_vlm.experiments.head_attribution.measurements import as_row, from_row
from hooked_vlm.experiments.head_attribution.regression import chosen, convergence, fit, settled_at
from hooked_vlm.runtime.store import ResultStore


def linear_case(rng: np.random.Generator, noise: float, n: int = 320) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks over 16 parts, values linear in them but for noise, and the coefficients."""
    kept, true = rng.random((n, 16)) < 0.5, rng.normal(size=16)
    return kept, 3.0 + kept @ true + noise * rng.normal(size=n), true


def test_regression_recovers_known_coefficients_and_foretells_what_it_has_not_seen() -> None:
    kept, values, true = linear_case(np.random.default_rng(0), noise=0)
    found = fit(kept, values, "ols", 0.1, 50, seed=0)
    np.testing.assert_allclose(found.coefficients, true, atol=1e-10)
    assert found.intercept == pytest.approx(3.0) and (found.n_train, found.n_held_out) == (288, 32)
    assert found.pearson == pytest.approx(1) and found.r2 == pytest.approx(1)


def test_held_out_measures_are_of_the_last_masks_alone() -> None:
    kept, values, _ = linear_case(np.random.default_rng(1), noise=1.0)
    found = fit(kept, values, "ols", 0.25, 20, seed=0)
    foretold = LinearRegression().fit(kept[:240], values[:240]).predict(kept[240:])
    assert found.pearson == pytest.approx(np.corrcoef(foretold, values[240:])[0, 1])
    assert found.r2 == pytest.approx(1 - np.mean((values[240:] - foretold) ** 2) / values[240:].var())
    constant = fit(kept, np.ones(320), "ols", 0.25, 20, seed=0)
    assert np.isnan(constant.pearson) and np.isnan(constant.r2)


def test_penalties_are_chosen_by_what_the_masks_say() -> None:
    rng = np.random.default_rng(3)
    kept = rng.random((200, 40)) < 0.5
    values = 2.0 * kept[:, 0] - 1.5 * kept[:, 1] + 0.3 * rng.normal(size=200)
    lasso = fit(kept, values, "lasso", 0.1, 5, seed=0)
    assert set(np.argsort(-np.abs(lasso.coefficients))[:2]) == {0, 1}
    assert (lasso.coefficients == 0).sum() > 10 and lasso.pearson > 0.95
    exact = kept[:, :16] @ np.arange(16.0)
    ridge = chosen("ridge", kept[:, :16].astype(float), exact).fit(kept[:, :16].astype(float), exact)
    np.testing.assert_allclose(ridge.coef_, np.arange(16.0), atol=1e-2)


def test_coefficients_settle_with_more_masks() -> None:
    kept, values, _ = linear_case(np.random.default_rng(4), noise=2.0, n=2000)
    curve = convergence(kept, values, "ols", 0.1, penalty=0.0)
    assert curve["n"].iloc[-1] == 900
    assert curve["reliability"].iloc[-1] > 0.95 > curve["reliability"].iloc[0]
    first, second = (LinearRegression().fit(kept[a:b], values[a:b]).coef_ for a, b in ((0, 900), (900, 1800)))
    assert curve["reliability"].iloc[-1] == pytest.approx(np.corrcoef(first, second)[0, 1])


@pytest.mark.parametrize(("kind", "penalty"), [("ols", 0.0), ("ridge", 3.0), ("lasso", 0.02)])
@pytest.mark.parametrize("n", [60, 400])
def test_reliability_is_that_of_fits_of_their_own(kind: Any, penalty: float, n: int) -> None:
    """With 60 masks, 27 of each half determine 16 coefficients; of 12 masks below, they do not."""
    kept, values, _ = linear_case(np.random.default_rng([8, n]), noise=1.0, n=n)
    model = {"ols": LinearRegression(), "ridge": Ridge(alpha=penalty), "lasso": Lasso(alpha=penalty, max_iter=10000)}
    held = n // 10
    for row in convergence(kept, values, kind, 0.1, penalty).to_dict("records"):
        m = row["n"]
        first, second = (clone(model[kind]).fit(kept[a:b], values[a:b]) for a, b in ((0, m), (m, 2 * m)))
        assert row["reliability"] == pytest.approx(np.corrcoef(first.coef_, second.coef_)[0, 1], abs=1e-6)
        assert row["r2"] == pytest.approx(first.score(kept[-held:], values[-held:]), abs=1e-6)


@pytest.mark.parametrize(
    ("reliability", "expected"),
    [([0.5, 0.96, 0.9, 0.97, 0.99], 40.0), ([0.96, 0.99, 0.99, 1, 1], 10.0), ([0.9, 0.9, 0.9, 0.99, 0.9], np.nan)],
)
def test_settled_means_for_good(reliability: list[float], expected: float) -> None:
    curve = pd.DataFrame({"n": [10, 20, 30, 40, 50], "reliability": reliability})
    assert settled_at(curve) == pytest.approx(expected, nan_ok=True)


def test_masks_are_kept_whole_and_keep_their_share() -> None:
    kept = random_masks(400, 19, 0.3, [0, 1])
    assert abs(kept.mean() - 0.3) < 0.03
    back, values = from_frame(as_frame(kept, np.arange(400.0)), 19)
    assert (back == kept).all() and (values == np.arange(400)).all()
    assert [n_masks(None, 16), n_masks(None, 784), n_masks(50, 784)] == [320, 3920, 50]


def test_antithetic_masks_come_with_their_complements() -> None:
    kept = draw_masks("antithetic", 51, 10, 7, 0.5, [3])
    assert (kept[:40:2] == ~kept[1:40:2]).all() and len(kept) == 51
    assert (kept[-10:] == random_masks(10, 7, 0.5, [3])).all()


@pytest.mark.parametrize("keep", [0.5, 0.35])
def test_balanced_masks_keep_every_part_equally_often(keep: float) -> None:
    kept = draw_masks("balanced", 65, 5, 9, keep, [3])[:60].reshape(3, BLOCK, 9)
    assert (kept.sum(1) == keep * BLOCK).all()
    assert len({tuple(column) for column in kept[0].T}) > 5  # each part in an order of its own


def test_paired_masks_differ_in_one_part_and_the_parts_take_turns() -> None:
    kept = draw_masks("paired", 60, 4, 7, 0.5, [3])[:56]
    first, second = kept[::2], kept[1::2]
    assert ((first != second).sum(1) == 1).all() and (first[first != second]).all()
    assert ((first != second).sum(0) == 4).all()  # 28 pairs of 7 parts


@pytest.mark.parametrize("regression", ["ols", "ridge", "lasso"])
def test_the_fewest_masks_are_enough_for_every_regression(regression: Any) -> None:
    Attribute(masks=12, regression=regression).check()
    kept, values, _ = linear_case(np.random.default_rng(0), noise=1.0, n=12)
    assert fit(kept, values, regression, 0.1, 5, seed=0).n_train == 10
    assert convergence(kept, values, regression, 0.1, penalty=0.01)["n"].tolist() == [5]


def test_a_fit_without_intervals_is_stored_and_read_back(tmp_path: Path) -> None:
    """Fewer masks than parts do not determine the coefficients: NaN, not None, after a table on disk."""
    kept, values, _ = linear_case(np.random.default_rng(0), noise=1.0, n=14)
    found = fit(kept, values, "ols", 0.1, 5, seed=0)
    store = ResultStore(tmp_path)
    store.put({"picture": 0}, as_row(found))
    table = store.get({"picture": 0})
    assert table is not None
    back = from_row(table)
    assert np.isnan(back.low).all() and np.isnan(back.high).all() and back.low.dtype == float
    np.testing.assert_array_equal(back.coefficients, found.coefficients)
    assert (back.penalty, back.n_train) == (0.0, 12)
