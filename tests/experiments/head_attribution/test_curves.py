"""Faithfulness and completeness of the heads kept or removed in order, by hand."""

from typing import Any

import numpy as np
import pytest
from probes import ablation, probe_of, value_under
from scipy import stats

from hooked_vlm.analysis.multiple_testing import holm
from hooked_vlm.experiments.head_attribution.curves import (
    area,
    crossings,
    first_at,
    gains,
    holds_from,
    measure_curves,
    measures_of_all,
    orders,
    shares,
    sizes,
)
from hooked_vlm.experiments.head_attribution.show_curves import KINDS, MAIN, NEEDED_BOTH, Compared, differences


def test_areas_and_numbers_of_heads_by_hand() -> None:
    k = np.array([0, 1, 2, 4])
    curve = np.array([0.0, 0.5, 0.9, 1.0])
    assert area(k, curve) == pytest.approx((0.25 + 0.7 + 1.9) / 4)
    assert first_at(k, 0.8, curve) == 2 and first_at(k, 0.95, curve) == 4
    assert first_at(k, 0.8, curve, np.array([0.0, 0.9, 0.7, 0.8])) == 4
    assert np.isnan(first_at(k, 1.1, curve))
    dips = np.array([0.0, 0.9, 0.7, 0.8])
    assert first_at(k, 0.8, dips) == 1 and holds_from(k, 0.8, dips) == 4 and holds_from(k, 0.7, dips) == 1
    assert holds_from(k, 0.0, dips) == 0 and np.isnan(holds_from(k, 0.85, dips))
    assert sizes(4).tolist() == [0, 1, 2, 3, 4]
    assert sizes(784)[0] == 0 and sizes(784)[-1] == 784 and len(sizes(784)) <= 33


def test_faithfulness_and_completeness_go_from_none_to_all(toy: str) -> None:
    probe = probe_of(toy)
    scores = np.random.default_rng(0).normal(size=len(probe.heads))
    frame = measure_curves(probe.over_heads, orders({"attribution": scores}, 3, [0, 0]))
    found = shares(frame)
    for ranking in ("attribution", "random"):
        own = found.query(f"ranking == '{ranking}'")[["faithfulness", "completeness"]].to_numpy()
        assert (own[0] == 0).all() and (own[-1] == 1).all()
    # one point by hand: only the top five keep the image in sight
    top = [probe.heads[i] for i in np.argsort(-scores)[:5]]
    rest = [head for head in probe.heads if head not in top]
    full, none = value_under(probe, []), value_under(probe, ablation(probe, probe.heads))
    kept, lost = value_under(probe, ablation(probe, rest)), value_under(probe, ablation(probe, top))
    (point,) = found.query("ranking == 'attribution' and k == 5").to_dict("records")
    assert point["faithfulness"] == pytest.approx((kept - none) / (full - none), abs=1e-4)
    assert point["completeness"] == pytest.approx((full - lost) / (full - none), abs=1e-4)


def test_pictures_that_add_nothing_have_no_shares() -> None:
    frame = measure_curves(lambda kept: kept.sum(1) * 0.1, orders({"attribution": np.arange(3.0)}, 0, [0]))
    assert shares(frame)[["faithfulness", "completeness"]].isna().to_numpy().all()


def test_random_orders_are_measured_one_by_one() -> None:
    """Of two heads one does it all: the k at which the mean of both orders' curves reaches 0.8 is 2, the mean k 1.5."""
    ranked = {("attribution", 0): np.array([0, 1]), ("random", 0): np.array([0, 1]), ("random", 1): np.array([1, 0])}
    curves = measure_curves(lambda kept: kept[:, 0].astype(float), ranked)
    table = measures_of_all({"a": shares(curves)}, ["attribution", "random"]).set_index("ranking")
    assert table["heads needed for 0.8 of both"].to_dict() == {"attribution": 1.0, "random": 1.5}
    assert table["censored, heads needed for 0.8 of both"].to_dict() == {"attribution": 0.0, "random": 0.5}
    gained = gains(curves, "random", "faithfulness")
    assert gained.tolist() == [0.0, 0.5, 1.0]
    assert area(np.arange(3), gained) == 0.5


def test_pictures_that_need_all_heads_are_censored_and_not_dropped() -> None:
    """Two heads of three are needed together, and ranked first and last: no smaller set reaches the level."""
    ranked = {("attribution", 0): np.array([0, 1, 2])}
    needs_both = measure_curves(lambda kept: 5.0 * (kept[:, 0] & kept[:, 2]), ranked)
    found = crossings(shares(needs_both))
    assert found["heads needed for 0.8 of faithfulness"] == 3 and found["heads needed for 0.8 of completeness"] == 1
    table = measures_of_all({"a": shares(needs_both)}, ["attribution"])
    assert table["censored, heads needed for 0.8 of faithfulness"].item() == 1
    assert table["censored, heads needed for 0.8 of completeness"].item() == 0


def compared_of(kept_values: list[np.ndarray], names: list[str]) -> Compared:
    """Curves of two rankings over three heads, each picture with its own weights of heads."""
    orders_ = {("attribution", 0): np.array([0, 1, 2]), ("single", 0): np.array([2, 1, 0])}
    frames = [measure_curves(lambda kept, w=weights: kept @ w, orders_) for weights in kept_values]
    gaps = np.array([weights.sum() for weights in kept_values])
    ks, values = np.arange(4), {}
    table = measures_of_all({str(i): shares(frame) for i, frame in enumerate(frames)}, ["attribution", "single"])
    for name in ("attribution", "single"):
        areas = {f"{kind} area": [area(ks, gains(f, name, kind)) for f in frames] for kind in KINDS}
        values[name] = table.query(f"ranking == '{name}'").reset_index(drop=True).assign(**areas)
    return Compared(["attribution", "single"], names, gaps, values, 0)


def test_areas_are_ratios_of_means_over_all_pictures() -> None:
    """A picture to which the image adds next to nothing has a share far from 1, and hardly counts."""
    weights = [np.array([3.0, 2.0, 1.0]), np.array([6.0, 1.0, 1.0]), np.array([-5.0, 0.05, 4.96])]
    own = compared_of(weights, ["a", "b", "c"])
    numerators = [(w[0] / 2 + w[:2].sum() + w.sum() / 2 + w[0] / 2) / 3 for w in weights]
    expected = sum(numerators) / sum(w.sum() for w in weights)
    assert own.mean("attribution", "faithfulness area").value == pytest.approx(expected)
    assert own.mean("attribution", "faithfulness area").n == 3
    assert own.mean("attribution", NEEDED_BOTH).n == 2  # of the third, no share is known


def test_differences_are_paired_and_their_family_is_the_table() -> None:
    rng = np.random.default_rng(0)
    weights = [np.array([3.0, 2.0, 1.0]) + 0.3 * rng.normal(size=3) for _ in range(12)]
    table: Any = differences(compared_of(weights, [str(i % 4) for i in range(12)]), 3, 40)
    assert table["ranking"].unique().tolist() == ["head attribution"] and len(table) == len(MAIN)
    assert table["runs per picture"].tolist() == [40] * 3 and table["runs per picture, against"].tolist() == [3] * 3
    assert not table["equal budget"].any()
    np.testing.assert_allclose(table["adjusted p, by name"], holm(table["p, by name"].to_numpy()))
    row = table.loc[table["measure"] == "faithfulness area"].iloc[0]
    gaps = np.array([w.sum() for w in weights])
    changes = np.array([(w[0] - w[2]) * 2 / 3 for w in weights])
    assert row["value"] == pytest.approx(changes.sum() / gaps.sum())
    assert row["p, by picture"] == pytest.approx(stats.ttest_1samp(changes, 0.0)[1])
