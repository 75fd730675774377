"""Faithfulness and completeness: how much of the target the top heads recover, and how much is lost without them.

faithfulness(k) = (only the top k kept - all ablated) / (all kept - all ablated)
completeness(k) = (all kept - the top k ablated) / (all kept - all ablated)
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

LEVELS = (0.8, 0.9)
FEW = 33
"""Largest number of sizes k that are measured; models with fewer heads are measured at every k."""
MIN_GAP = 0.5
"""Pictures whose target drops by less than this without any head are left out: shares of a small gap are noise."""

Curve = Float[np.ndarray, "k"]
Order = Int[np.ndarray, "unit"]
Measure = Callable[[Bool[np.ndarray, "mask unit"]], Float[np.ndarray, "mask"]]


def sizes(n_units: int) -> Int[np.ndarray, "k"]:
    """Sizes k to measure, from 0 to all heads (or image tokens); denser at the beginning where there are many."""
    if n_units < FEW:
        return np.arange(n_units + 1)
    return np.unique(np.concatenate(([0], np.geomspace(1, n_units, FEW - 1).round())).astype(int))


def orders(
    scores: Mapping[str, Float[np.ndarray, "unit"]], n_random: int, seed: list[int]
) -> dict[tuple[str, int], Order]:
    """Order heads (or image tokens) by every ranking, best first with stable ties, and at random.

    Returns:
        {(ranking, draw): order}.
    """
    found = {(name, 0): np.argsort(-values, kind="stable") for name, values in scores.items()}
    rng = np.random.default_rng(seed)
    n_units = len(next(iter(scores.values())))
    return found | {("random", draw): rng.permutation(n_units) for draw in range(n_random)}


def measure_curves(measure: Measure, ranked: Mapping[tuple[str, int], Order]) -> pd.DataFrame:
    """Measure the target with only the top k kept, and with the top k ablated.

    `measure` gives the target for masks, True for kept. Sets that several rankings share are measured once.

    Returns:
        Table with `ranking`, `draw`, `k`, `kept`, `ablated`.
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
    """Add `faithfulness` and `completeness` to one picture's curves.

    NaN where the target drops by less than `MIN_GAP` without any head.
    """
    none, full = curves.query("k == 0")[["kept", "ablated"]].to_numpy()[0]
    gap = full - none if full - none >= MIN_GAP else np.nan
    return curves.assign(
        faithfulness=(curves["kept"] - none) / gap,
        completeness=(full - curves["ablated"]) / gap,
    )


def gains(curves: pd.DataFrame, ranking: str, kind: str) -> Curve:
    """Numerator of faithfulness or completeness of one picture by one ranking, by k; averaged over draws if random.

    Its last entry is the denominator: what the image adds to the target.
    """
    own = curves.loc[curves["ranking"] == ranking]
    none, full = own.query("k == 0")[["kept", "ablated"]].to_numpy()[0]
    gained = own["kept"] - none if kind == "faithfulness" else full - own["ablated"]
    return gained.groupby(own["k"]).mean().to_numpy()


def area(k: Int[np.ndarray, "k"], curve: Curve) -> float:
    """Area under a curve over the share of heads (trapezoidal): 1 if one head suffices, 0.5 for the diagonal."""
    return float(np.trapezoid(curve, k / k[-1]))


def first_at(k: Int[np.ndarray, "k"], level: float, *curves: Curve) -> float:
    """Smallest measured k at which all curves reach a level; NaN if there is none."""
    reached = np.all([curve >= level for curve in curves], axis=0)
    return float(k[np.argmax(reached)]) if reached.any() else np.nan


def holds_from(k: Int[np.ndarray, "k"], level: float, *curves: Curve) -> float:
    """Smallest measured k from which on all curves stay at a level or above; NaN if they end below."""
    reached = np.all([curve >= level for curve in curves], axis=0)
    if not reached[-1]:
        return np.nan
    return float(k[len(k) - int(np.argmin(reached[::-1]))] if not reached.all() else k[0])


NEEDED, HOLDS = "{units} needed for {level:g} of {of}", "{units} from which {level:g} of {of} holds"
"""Names of the first and the last crossing of a level."""
CENSORED = "censored"
OF = ("faithfulness", "completeness", "both")


def crossings(curves: pd.DataFrame, units: str = "heads") -> dict[str, float]:
    """First and last crossing of each level, for one picture and one order.

    With all heads both curves are 1 by definition. A picture whose curve reaches a level there only is censored: it
    counts as if it needed all of them, which is the least that it may need. NaN where the picture has no shares.
    """
    k = curves["k"].to_numpy()
    faithful, complete = curves["faithfulness"].to_numpy(), curves["completeness"].to_numpy()
    found = {}
    for level in LEVELS:
        for of, own in zip(OF, ((faithful,), (complete,), (faithful, complete)), strict=True):
            labels = {"units": units, "level": level, "of": of}
            found[NEEDED.format(**labels)] = first_at(k, level, *own)
            found[HOLDS.format(**labels)] = holds_from(k, level, *own)
    return found


def measures_of_all(curves: Mapping[str, pd.DataFrame], rankings: Sequence[str], units: str = "heads") -> pd.DataFrame:
    """Crossings of every picture and ranking, one row each; `curves` holds each picture's `shares`.

    Those of random orders are averaged, not their curves: the k at which a mean curve reaches a level is not the mean
    k. For each crossing the column "censored, ..." has the share of orders that are censored there.
    """
    rows = []
    for image, own in curves.items():
        for ranking in rankings:
            draws = [crossings(draw, units) for _, draw in own.query(f"ranking == '{ranking}'").groupby("draw")]
            table = pd.DataFrame(draws)
            late = (table == own["k"].max()).where(table.notna()).mean().add_prefix(f"{CENSORED}, ")
            rows.append({"image": image, "ranking": ranking, **table.mean(), **late})
    return pd.DataFrame(rows)
