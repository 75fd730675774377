"""Report section on faithfulness and completeness."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from hooked_vlm.analysis.intervals import mean_p
from hooked_vlm.analysis.multiple_testing import holm
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.head_attribution import plots
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig
from hooked_vlm.experiments.head_attribution.curves import (
    CENSORED,
    HOLDS,
    LEVELS,
    MIN_GAP,
    NEEDED,
    area,
    gains,
    measures_of_all,
    shares,
    sizes,
)
from hooked_vlm.experiments.head_attribution.findings import (
    BY_NAME,
    BY_PICTURE,
    Findings,
    OverPictures,
    Section,
    over_pictures,
    ratio_band,
    ratio_over_pictures,
    row,
)
from hooked_vlm.experiments.head_attribution.measurements import Measured
from hooked_vlm.experiments.head_attribution.rankings import EQUAL_BUDGET, RANKINGS, runs_per_picture

KINDS = ("faithfulness", "completeness")
NEEDED_BOTH = NEEDED.format(units="heads", level=LEVELS[0], of="both")
MAIN = (NEEDED_BOTH, "faithfulness area", "completeness area")
MEASURES = (*MAIN, HOLDS.format(units="heads", level=LEVELS[0], of="both"))
MEASURES += tuple(NEEDED.format(units="heads", level=LEVELS[0], of=of) for of in KINDS)
MEASURES += (NEEDED.format(units="heads", level=LEVELS[1], of="both"),)


@dataclass(frozen=True, eq=False)
class Compared:
    """Measures of every ranking on every picture."""

    rankings: list[str]
    names: list[str]
    gaps: np.ndarray
    """What the image adds to the target, by picture: the denominator of shares and areas."""
    values: dict[str, pd.DataFrame]
    """Ranking -> one row a picture: crossings, and numerators of areas."""
    seed: int

    def mean(self, ranking: str, measure: str) -> OverPictures:
        """Mean of a crossing, or an area: a ratio of means."""
        return self._over(self.values[ranking][measure].to_numpy(dtype=float), measure)

    def difference(self, one: str, other: str, measure: str) -> tuple[OverPictures, float, float]:
        """Mean difference, paired over pictures, and its p by picture and by name."""
        a, b = (self.values[name][measure].to_numpy(dtype=float) for name in (one, other))
        known = np.isfinite(a - b)
        changed, names = (a - b)[known], np.array(self.names)[known]
        ps = (np.nan, np.nan) if not len(changed) else (float(mean_p(changed)), float(mean_p(changed, names)))
        return self._over(a - b, measure), *ps

    def _over(self, values: np.ndarray, measure: str) -> OverPictures:
        if measure.endswith("area"):
            return ratio_over_pictures(values, self.gaps, self.names, self.seed)
        return over_pictures(values, self.names, self.seed)

    def censored(self, ranking: str, measure: str) -> float:
        """Number of pictures that reach the level with all heads only; of random orders, their mean number."""
        column = f"{CENSORED}, {measure}"
        return float(self.values[ranking][column].to_numpy().sum()) if column in self.values[ranking] else np.nan


def compared(found: Measured, seed: int) -> Compared:
    """Measures of the curves of a run."""
    own = {image: shares(frame) for image, frame in zip(found.images, found.curves, strict=True)}
    rankings = list(dict.fromkeys(found.curves[0]["ranking"]))
    table = measures_of_all(own, rankings)
    ks = sizes(found.coefficients.shape[1])
    values = {}
    for name in rankings:
        areas = {f"{kind} area": [area(ks, gains(frame, name, kind)) for frame in found.curves] for kind in KINDS}
        values[name] = table.query(f"ranking == '{name}'").reset_index(drop=True).assign(**areas)
    return Compared(rankings, found.names, found.gaps, values, seed)


def curves(report: Report, found: Measured, config: HeadAttributionConfig) -> Section:
    """Report the curves of all rankings, their measures, and attribution against each other ranking."""
    own = compared(found, config.seed)
    n_heads, n_masks = found.coefficients.shape[1], len(found.heads[0].values)
    n_used = int((found.gaps >= MIN_GAP).sum())
    report.section(
        "Faithfulness and completeness",
        f"Faithfulness is the share of the effect of {config.carrier} on the target that the top k heads recover "
        "alone; completeness is the share that is lost when these k are ablated. Each picture has its own rankings; "
        f"random ones are means over {config.random_rankings} draws. Shares and areas are ratios of means over all "
        f"{len(found.gaps)} pictures; areas are over the share of the {n_heads} heads.",
        f"Heads needed: the smallest k at which a picture's curves reach a level, of {n_used} pictures, those to which "
        f"{config.carrier} adds at least {MIN_GAP}. Curves may fall again, so the k from which on the level holds is "
        "given, too. With all heads both curves are 1 by definition: a picture that reaches the level only there is "
        f"censored and counts as {n_heads}, which makes means of heads needed restricted means.",
        "Runs per picture is what a ranking costs. Random masks are compared with runs of single heads at equal "
        "budgets: regressions on the first masks, as many as these rankings have runs (ridge). Comparisons at other "
        "budgets are marked.",
    )
    ks = sizes(n_heads)
    figures = {kind: {RANKINGS[name]: _curve(own, found, name, kind) for name in own.rankings} for kind in KINDS}
    report.figure(
        "curves",
        plots.bands(ks, figures, "k (heads)", dict.fromkeys(figures, LEVELS[0])),
        f"Ratios of means over {len(found.gaps)} pictures, 95% intervals by picture",
    )
    report.table("curve_measures", _summary(own, n_heads, n_masks), f"Measures of the rankings; {n_heads} heads in all")
    table = differences(own, n_heads, n_masks)
    report.table(
        "curve_differences",
        table,
        "Attribution minus each other ranking, paired over pictures. p: two-sided t tests over pictures and over "
        f"names; the adjusted one is Holm's for the {len(table)} tests of this table, by name",
    )
    images = pd.concat([own.values[name].assign(image=found.images) for name in own.rankings], ignore_index=True)
    report.table("curve_images", images, f"Measures of every picture; areas times what {config.carrier} adds", shown=8)
    report.table("curve_points", _points(own, found, ks), "Curves", shown=8)
    findings: Findings = {
        f"{measure}, {RANKINGS[name]}": own.mean(name, measure) for name in own.rankings for measure in MAIN
    }
    return Section(findings, _answer(own, table, n_heads, n_masks, config.carrier))


def _answer(own: Compared, table: pd.DataFrame, n_heads: int, n_masks: int, carrier: str) -> tuple[str, ...]:
    """How many heads are needed, and attribution against single heads at an equal budget."""
    needed = own.mean("attribution", NEEDED_BOTH)
    if not needed.n:
        return (f"{carrier.capitalize()} adds too little to the answer on every picture to count the heads it needs.",)
    sentences = [
        f"Of {n_heads} heads, the top {needed.brief}, by attribution from {n_masks} masks recover {LEVELS[0]:g} of "
        f"the effect of {carrier}, and lose as much when ablated (in random order: "
        f"{own.mean('random', NEEDED_BOTH).brief})."
    ]
    equal = table.loc[table["equal budget"] & (table["measure"] == NEEDED_BOTH)]
    for against in equal.loc[equal["against"] == RANKINGS["alone_single"]].to_dict("records"):
        p = against["adjusted p, by name"]
        verdict = "no evidence of a difference" if not p <= 0.05 else "fewer" if against["value"] < 0 else "more"
        one = next(name for name in own.rankings if RANKINGS[name] == against["ranking"])
        mine, others = (own.mean(name, NEEDED_BOTH).brief for name in (one, "alone_single"))
        tested = "" if np.isnan(p) else f" (adjusted p = {p:.2g})"
        sentences.append(
            f"At an equal budget of {against['runs per picture']} runs a picture, attribution needs {mine}, keeping "
            f"and ablating single heads {others}: {verdict}{tested}."
        )
    return tuple(sentences)


def differences(own: Compared, n_heads: int, n_masks: int) -> pd.DataFrame:
    """Attribution against every other ranking, from all masks and at equal budgets; Holm's p over the table."""
    pairs = [(one, other) for other, one in EQUAL_BUDGET.items() if {one, other} <= set(own.rankings)]
    pairs += [("attribution", name) for name in own.rankings if not name.startswith("attribution")]
    rows = []
    for one, other in pairs:
        budgets = [runs_per_picture(name, n_heads, n_masks) for name in (one, other)]
        for measure in MAIN:
            estimate, by_picture, by_name = own.difference(one, other, measure)
            labels: dict[str, Any] = {"ranking": RANKINGS[one], "against": RANKINGS[other], "measure": measure}
            labels |= {"runs per picture": budgets[0], "runs per picture, against": budgets[1]}
            ps = {"p, by picture": by_picture, "p, by name": by_name}
            rows.append(row(estimate, **labels, **{"equal budget": budgets[0] == budgets[1]}) | ps)
    table = pd.DataFrame(rows)
    return table.assign(**{"adjusted p, by name": holm(table["p, by name"].to_numpy())})


def _curve(own: Compared, found: Measured, ranking: str, kind: str, by_name: bool = False) -> plots.Band:
    stacked = np.stack([gains(frame, ranking, kind) for frame in found.curves])
    return ratio_band(stacked, own.gaps, own.seed, own.names if by_name else None)


def _summary(own: Compared, n_heads: int, n_masks: int) -> pd.DataFrame:
    rows = []
    for name in own.rankings:
        runs = runs_per_picture(name, n_heads, n_masks)
        for measure in MEASURES:
            labels: dict[str, Any] = {"ranking": RANKINGS[name], "runs per picture": runs, "measure": measure}
            rows.append(row(own.mean(name, measure), **labels) | {CENSORED: own.censored(name, measure)})
    return pd.DataFrame(rows)


def _points(own: Compared, found: Measured, ks: np.ndarray) -> pd.DataFrame:
    frames = []
    for kind in KINDS:
        for name in own.rankings:
            mean, *ends = _curve(own, found, name, kind)
            _, *named = _curve(own, found, name, kind, by_name=True)
            columns: dict[str, Any] = {"measure": kind, "ranking": RANKINGS[name], "k": ks, "value": mean}
            columns |= dict(zip((*BY_PICTURE, *BY_NAME), (*ends, *named), strict=True))
            frames.append(pd.DataFrame(columns | {"pictures": len(own.gaps)}))
    return pd.concat(frames, ignore_index=True)
