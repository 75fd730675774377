"""The report's section on faithfulness and completeness."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from hooked_vlm.analysis.statistics import bootstrap_mean, paired_p
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.head_attribution import plots
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig
from hooked_vlm.experiments.head_attribution.curves import LEVELS, MIN_GAP, mean_curve, measures_of_all, shares, sizes
from hooked_vlm.experiments.head_attribution.findings import Findings, band, row
from hooked_vlm.experiments.head_attribution.measurements import Measured
from hooked_vlm.experiments.head_attribution.rankings import RANKINGS

KINDS = ("faithfulness", "completeness")


def curves(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    """Curves of all rankings, what they come to, and attribution against each other ranking."""
    own = {image: shares(frame) for image, frame in zip(found.images, found.curves, strict=True)}
    rankings = list(dict.fromkeys(found.curves[0]["ranking"]))
    table = measures_of_all(own, rankings)
    n_used = int((found.gaps >= MIN_GAP).sum())
    n_heads = found.coefficients.shape[1]
    report.section(
        "Faithfulness and completeness",
        "Faithfulness: the share of what the image adds to the target that is there with the top k heads alone. "
        "Completeness: the share that is lost when these k are ablated. Rankings are made anew for each picture, from "
        f"it alone; random ones are means over {config.random_rankings} draws. Areas are over the share of the "
        f"{n_heads} heads. Pictures to which the image adds less than {MIN_GAP} do not count; {n_used} of {len(own)} "
        "do.",
    )
    ks = sizes(n_heads)
    panels = {kind: {RANKINGS[name]: _band(own, name, kind, config.seed) for name in rankings} for kind in KINDS}
    report.figure(
        "curves",
        plots.bands(ks, panels, "k (heads)", dict.fromkeys(panels, LEVELS[0])),
        f"Means over {n_used} pictures, 95% intervals",
    )
    summary = _summary(table, rankings, config.seed)
    report.table("curve_measures", summary, f"Means over pictures; k is counted in heads of {n_heads}")
    report.table("curve_differences", _differences(table, rankings, config.seed), _DIFFERENCES)
    report.table("curve_images", table, "Every picture", shown=8)
    report.table("curve_points", _points(panels, ks, n_used), "The curves' means", shown=8)
    findings = {}
    for name in rankings:
        for measure in (f"k both at {LEVELS[0]:g}", "faithfulness area", "completeness area"):
            values = table.loc[table["ranking"] == name, measure].to_numpy()
            findings[f"{measure}, {RANKINGS[name]}"] = bootstrap_mean(values, config.seed)
    return findings


_DIFFERENCES = "Attribution less each other ranking, pictures paired; p by exchanging signs, two-sided"


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
        for measure in (f"k both at {LEVELS[0]:g}", "faithfulness area", "completeness area"):
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
