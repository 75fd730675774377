"""Faithfulness and completeness: how much of the target the top heads carry, and how much goes with them.

faithfulness(k) = (only the top k kept - all ablated) / (all kept - all ablated)
completeness(k) = (all kept - the top k ablated) / (all kept - all ablated)
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

LEVELS = (0.8, 0.9)
FEW = 33
"""Up to so many sizes k are measured; all of them where there are no more heads."""
MIN_GAP = 0.5
"""Pictures whose target loses less than this without any head are left out: shares of so little say nothing."""

Curve = Float[np.ndarray, "k"]
Order = Int[np.ndarray, "unit"]
Measure = Callable[[Bool[np.ndarray, "mask unit"]], Float[np.ndarray, "mask"]]


def sizes(n_units: int) -> Int[np.ndarray, "k"]:
    """0 to all heads (or image tokens); where these are many, denser at the beginning."""
    if n_units < FEW:
        return np.arange(n_units + 1)
    return np.unique(np.concatenate(([0], np.geomspace(1, n_units, FEW - 1).round())).astype(int))


def orders(
    scores: Mapping[str, Float[np.ndarray, "unit"]], n_random: int, seed: list[int]
) -> dict[tuple[str, int], Order]:
    """Heads (or image tokens) by every ranking, best first, ties in their own order, and random; by (ranking, draw)."""
    found = {(name, 0): np.argsort(-values, kind="stable") for name, values in scores.items()}
    rng = np.random.default_rng(seed)
    n_units = len(next(iter(scores.values())))
    return found | {("random", draw): rng.permutation(n_units) for draw in range(n_random)}


def measure_curves(measure: Measure, ranked: Mapping[tuple[str, int], Order]) -> pd.DataFrame:
    """The target with only the top k kept, and with these ablated: `ranking`, `draw`, `k`, `kept`, `ablated`.

    `measure` gives the target for masks, True for kept. Sets that several rankings share are measured once.
    """
    n_units = len(next(iter(ranked.values())))
    wanted: dict[bytes, np.ndarray] = {}
    rows = []
    for (ranking, draw), order in ranked.items():
        for k in sizes(n_units).tolist():
            top = np.zeros(n_units, dtype=bool)
            top[order[:k]] = True
            wanted |= {top.tobytes(): top, (~top).tobytes(): ~top}
            rows.append((ranking, draw, k, top.tobytes(), (~top).tobytes()))
    values = dict(zip(wanted, measure(np.stack(list(wanted.values()))).tolist(), strict=True))
    return pd.DataFrame(
        [(ranking, draw, k, values[top], values[rest]) for ranking, draw, k, top, rest in rows],
        columns=["ranking", "draw", "k", "kept", "ablated"],
    )


def shares(curves: pd.DataFrame) -> pd.DataFrame:
    """One picture's curves with `faithfulness` and `completeness`.

    Not a number where the target loses less than `MIN_GAP` without any head.
    """
    none, full = curves.query("k == 0")[["kept", "ablated"]].to_numpy()[0]
    gap = full - none if full - none >= MIN_GAP else np.nan
    return curves.assign(
        faithfulness=(curves["kept"] - none) / gap,
        completeness=(full - curves["ablated"]) / gap,
    )


def mean_curve(shares: pd.DataFrame, ranking: str, kind: str) -> Curve:
    """One picture's faithfulness or completeness by one ranking, a mean over draws where it is random."""
    own = shares.loc[shares["ranking"] == ranking]
    return own.groupby("k")[kind].mean().to_numpy()


def area(k: Int[np.ndarray, "k"], curve: Curve) -> float:
    """Under a curve over the share of heads, by trapezoids: 1 if one head does it all, 0.5 for the diagonal."""
    return float(np.trapezoid(curve, k / k[-1]))


def first_at(k: Int[np.ndarray, "k"], level: float, *curves: Curve) -> float:
    """The smallest k (of those measured) at which all of the curves reach a level; NaN if none does."""
    reached = np.all([curve >= level for curve in curves], axis=0)
    return float(k[np.argmax(reached)]) if reached.any() else np.nan


def measures(curves: pd.DataFrame) -> dict[str, float]:
    """Of one picture and one order of heads: areas under both curves, and the number of heads at each level."""
    k = curves["k"].to_numpy()
    faithful, complete = curves["faithfulness"].to_numpy(), curves["completeness"].to_numpy()
    found = {"faithfulness area": area(k, faithful), "completeness area": area(k, complete)}
    for level in LEVELS:
        found |= {
            f"k faithful at {level:g}": first_at(k, level, faithful),
            f"k complete at {level:g}": first_at(k, level, complete),
            f"k both at {level:g}": first_at(k, level, faithful, complete),
        }
    return found


def measures_of_all(curves: Mapping[str, pd.DataFrame], rankings: Sequence[str]) -> pd.DataFrame:
    """One row per picture and ranking; the curves are `shares` of each picture.

    Random orders are measured one by one, and the mean is taken of what they come to: the k at which a mean of curves
    reaches a level is not the mean k.
    """
    rows = []
    for image, own in curves.items():
        for ranking in rankings:
            draws = [measures(draw) for _, draw in own.query(f"ranking == '{ranking}'").groupby("draw")]
            rows.append({"image": image, "ranking": ranking, **pd.DataFrame(draws).mean()})
    return pd.DataFrame(rows)
