"""Report section on the layers of important heads and on the agreement between pictures."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from hooked_vlm.analysis.statistics import Estimate, bootstrap, bootstrap_mean
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.head_attribution import plots
from hooked_vlm.experiments.head_attribution.agreement import causes_of, explained, mean_of_pairs, similarities
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig
from hooked_vlm.experiments.head_attribution.findings import Findings, band, row
from hooked_vlm.experiments.head_attribution.measurements import Measured
from hooked_vlm.experiments.head_attribution.rankings import RANKINGS

SCORES = ("attention", "attention_final", "value_weighted", "gradient", "single", "alone")


def where(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    """Report importance by layer, attention against importance, agreement between pictures and its causes."""
    report.section("Layers, attention, agreement")
    findings = _layers(report, found, config)
    findings |= _attention(report, found, config)
    findings |= _agreement(report, found, config)
    return findings


def _layers(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    n_layers = found.probes[0].model.cfg.n_layers
    positive = found.coefficients.clip(0).reshape(len(found.heads), n_layers, -1).sum(2)
    positive = positive[positive.sum(1) > 0]  # lasso may find nothing
    by_layer = positive / positive.sum(1, keepdims=True)
    mean, low, high = band(by_layer, config.seed)
    table = pd.DataFrame({"layer": range(n_layers), "share": mean, "low": low, "high": high, "n": len(by_layer)})
    centre = bootstrap_mean(by_layer @ np.arange(n_layers), config.seed)
    report.text(
        f"The mean layer of importance is {centre}, of layers 0 to {n_layers - 1}. A layer's importance is its share "
        f"of the sum of all positive coefficients, averaged over {len(by_layer)} pictures."
    )
    figure = plots.bands(np.arange(n_layers), {"share of positive coefficients": {"": (mean, low, high)}}, "layer")
    report.figure("layers", figure, f"Importance by layer, {len(by_layer)} pictures, 95% intervals")
    report.table("layers", table, "Importance by layer")
    return {"mean layer of coefficients": centre}


def _attention(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    rows, findings = [], {}
    means = found.coefficients.mean(0)
    for name in SCORES:
        scores = np.stack([frame[name].to_numpy() for frame in found.rankings])
        each = np.array([_spearman(a, b) for a, b in zip(scores, found.coefficients, strict=True)])
        own = bootstrap_mean(each, config.seed)
        over_heads = bootstrap(_spearman, scores.mean(0), means, seed=config.seed, draws=500)
        rows.append(row(own, score=RANKINGS[name], of="each picture (n pictures)"))
        rows.append(row(over_heads, score=RANKINGS[name], of="means over pictures (n heads)"))
        findings[f"Spearman of coefficients with {RANKINGS[name]}"] = own
    attention = np.stack([frame["attention"].to_numpy() for frame in found.rankings]).mean(0)
    layers = np.array([layer for layer, _ in found.probes[0].heads])
    label = ("attention to the image (mean over text behind it)", "coefficient")
    caption = f"One point per head ({len(means)} heads), means over {len(found.heads)} pictures"
    report.figure("attention", plots.scatter(attention, means, layers, label), caption)
    caption = "Rank correlation of coefficients with other scores; intervals over pictures, or over heads"
    report.table("attention", pd.DataFrame(rows), caption)
    return findings


def _agreement(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    vectors, n = found.coefficients, len(found.heads)
    if n < 3:
        report.text(f"Agreement between pictures needs at least three; there are {n}.")
        return {}
    top = config.top or max(1, vectors.shape[1] // 8)
    names = np.array(found.names)
    same = names[:, None] == names[None]
    rows, findings = [], {}
    squares = similarities(vectors, top)
    for kind, square in squares.items():
        for label, pairs in (("same name", same), ("other names", ~same)):
            estimate = mean_of_pairs(square, pairs, config.seed)
            rows.append(row(estimate, similarity=kind, pairs=label))
            findings[f"{kind} between pictures, {label}"] = estimate
    report.text(
        f"Similarity of the coefficient vectors of {n} pictures with {len(set(names))} names; n counts pairs, "
        "intervals resample pictures."
    )
    report.table("agreement", pd.DataFrame(rows), "Similarity between pictures")
    order = np.argsort(names, kind="stable")
    ordered = names[order].tolist()
    labels = [name if i == 0 or name != ordered[i - 1] else "" for i, name in enumerate(ordered)]
    figure = plots.heatmap(squares["cosine"][np.ix_(order, order)], labels, labels, ("", "", "cosine"), (-1, 1))
    report.figure("agreement", figure, f"Cosine between the coefficient vectors of {n} pictures, by name")
    causes = causes_of(found.cases, found.probes[0].model)
    frames = [explained(squares[kind], causes, config.seed).assign(similarity=kind) for kind in ("cosine", "Spearman")]
    table = pd.concat(frames, ignore_index=True)
    table.insert(0, "similarity", table.pop("similarity"))
    report.table(
        "explained",
        table,
        "Possible causes of similar coefficients: correlation over pairs, alone and controlled for the other causes "
        "(interval and one-sided permutation p of the latter). Names are compared by the mean embedding of their "
        "tokens, pictures by their mean image features, both centred",
    )
    return findings | _partial_findings(frames[0])


def _partial_findings(table: pd.DataFrame) -> Findings:
    return {
        f"cosine with {own['cause']}, controlled for {own['controlled for']}": Estimate(
            own["partial"], own["low"], own["high"], 0 if np.isnan(own["partial"]) else own["images"]
        )
        for own in table.to_dict("records")
    }


def _spearman(a: Any, b: Any) -> float:
    """Rank correlation; NaN where one of them is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.nan
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])
