"""Faithfulness and completeness of the heads kept or removed in order, by hand."""

import numpy as np
import pytest
from probes import ablation, probe_of, value_under

from hooked_vlm.experiments.head_attribution.curves import (
    area,
    first_at,
    mean_curve,
    measure_curves,
    measures_of_all,
    orders,
    shares,
    sizes,
)


def test_areas_and_numbers_of_heads_by_hand() -> None:
    k = np.array([0, 1, 2, 4])
    curve = np.array([0.0, 0.5, 0.9, 1.0])
    assert area(k, curve) == pytest.approx((0.25 + 0.7 + 1.9) / 4)
    assert first_at(k, 0.8, curve) == 2 and first_at(k, 0.95, curve) == 4
    assert first_at(k, 0.8, curve, np.array([0.0, 0.9, 0.7, 0.8])) == 4
    assert np.isnan(first_at(k, 1.1, curve))
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
    frame = shares(measure_curves(lambda kept: kept[:, 0].astype(float), ranked))
    table = measures_of_all({"a": frame}, ["attribution", "random"]).set_index("ranking")
    assert table["heads needed for 0.8 of both"].to_dict() == {"attribution": 1.0, "random": 1.5}
    assert table["faithfulness area"].to_dict() == {"attribution": 0.75, "random": 0.5}
    assert mean_curve(frame, "random", "faithfulness").tolist() == [0.0, 0.5, 1.0]
