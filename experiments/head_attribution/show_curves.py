"""Report section on faithfulness and completeness."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from hooked_vlm.analysis.statistics import Estimate, bootstrap_mean, paired_p
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.head_attribution import plots
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig
from hooked_vlm.experiments.head_attribution.curves import LEVELS, MIN_GAP, mean_curve, measures_of_all, shares, sizes
from hooked_vlm.experiments.head_attribution.findings import Findings, band, row
from hooked_vlm.experiments.head_attribution.measurements import Measured
from hooked_vlm.experiments.head_attribution.rankings import RANKINGS

KINDS = ("faithfulness", "completeness")


def curves(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    """Report the curves of all rankings, their measures, and attribution against each other ranking."""
    own = {image: shares(frame) for image, frame in zip(found.images, found.curves, strict=True)}
    rankings = list(dict.fromkeys(found.curves[0]["ranking"]))
    table = measures_of_all(own, rankings)
    n_used = int((found.gaps >= MIN_GAP).sum())
    n_heads = found.coefficients.shape[1]
    report.section(
        "Faithfulness and completeness",
        _answer(table, rankings, n_heads, config.seed),
        "Faithfulness is the share of the image's effect on the target that the top k heads recover alone; "
        "completeness is the share that is lost when these k are ablated. Each picture has its own rankings; random "
        f"ones are means over {config.random_rankings} draws. Areas are over the share of the {n_heads} heads. "
        f"{n_used} of {len(own)} pictures count: those to which the image adds at least {MIN_GAP}.",
    )
    ks = sizes(n_heads)
    panels = {kind: {RANKINGS[name]: _band(own, name, kind, config.seed) for name in rankings} for kind in KINDS}
    report.figure(
        "curves",
        plots.bands(ks, panels, "k (heads)", dict.fromkeys(panels, LEVELS[0])),
        f"Means over {n_used} pictures, 95% intervals",
    )
    summary = _summary(table, rankings, config.seed)
    report.table("curve_measures", summary, f"Means over pictures; {n_heads} heads in all")
    report.table("curve_differences", _differences(table, rankings, config.seed), _DIFFERENCES)
    report.table("curve_images", table, "Measures of every picture", shown=8)
    report.table("curve_points", _points(panels, ks, n_used), "Mean curves", shown=8)
    return {
        f"{measure}, {RANKINGS[name]}": _mean(table, name, measure, config.seed)
        for name in rankings
        for measure in MAIN
    }


MAIN = (f"heads needed for {LEVELS[0]:g} of both", "faithfulness area", "completeness area")
_DIFFERENCES = "Attribution minus each other ranking, paired over pictures; p from sign flips, two-sided"


def _mean(table: pd.DataFrame, ranking: str, measure: str, seed: int) -> Estimate:
    return bootstrap_mean(table.loc[table["ranking"] == ranking, measure].to_numpy(), seed)


def _answer(table: pd.DataFrame, rankings: list[str], n_heads: int, seed: int) -> str:
    needed = [f"{RANKINGS[name]} {_mean(table, name, MAIN[0], seed)}" for name in rankings]
    return f"Heads needed, of {n_heads}, for {LEVELS[0]:g} of both faithfulness and completeness: {', '.join(needed)}."


def _band(own: Mapping[str, pd.DataFrame], ranking: str, kind: str, seed: int) -> plots.Band:
    return band([mean_curve(frame, ranking, kind) for frame in own.values()], seed)


def _summary(table: pd.DataFrame, rankings: list[str], seed: int) -> pd.DataFrame:
    rows = []
    for name in rankings:
        values = table.query(f"ranking == '{name}'").drop(columns=["image", "ranking"])
        for measure in values.columns:
            estimate = bootstrap_mean(values[measure].to_numpy(), seed)
            rows.append(row(estimate, ranking=RANKINGS[name], measure=measure))
    return pd.DataFrame(rows)


def _differences(table: pd.DataFrame, rankings: list[str], seed: int) -> pd.DataFrame:
    wide = {name: table.query(f"ranking == '{name}'") for name in rankings}
    rows = []
    for name in rankings[1:]:
        for measure in MAIN:
            a, b = (wide[ranking][measure].to_numpy(dtype=float) for ranking in ("attribution", name))
            estimate = bootstrap_mean(a - b, seed)
            p = paired_p(a, b, seed) if estimate.n else np.nan
            rows.append(row(estimate, against=RANKINGS[name], measure=measure) | {"p": p})
    return pd.DataFrame(rows)


def _points(panels: Mapping[str, Mapping[str, plots.Band]], ks: np.ndarray, n: int) -> pd.DataFrame:
    frames = []
    for kind, lines in panels.items():
        for name, (mean, low, high) in lines.items():
            columns = {"measure": kind, "ranking": name, "k": ks, "value": mean, "low": low, "high": high, "n": n}
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)
