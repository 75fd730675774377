"""Report section on the layers of important heads and on the agreement between pictures."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from hooked_vlm.analysis.intervals import mean_interval
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.head_attribution import plots
from hooked_vlm.experiments.head_attribution.agreement import (
    RELIABLE,
    SAME,
    causes_of,
    conclusion,
    explained,
    mean_of_pairs,
    similarities,
)
from hooked_vlm.experiments.head_attribution.appearance import looks_of
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig
from hooked_vlm.experiments.head_attribution.findings import (
    BY_NAME,
    BY_PICTURE,
    Findings,
    OverPictures,
    Section,
    band,
    over_pictures,
    row,
)
from hooked_vlm.experiments.head_attribution.measurements import Measured
from hooked_vlm.experiments.head_attribution.rankings import RANKINGS

SCORES = ("attention", "attention_final", "value_weighted", "gradient", "single", "alone")


def where(report: Report, found: Measured, config: HeadAttributionConfig) -> Section:
    """Report importance by layer, attention against importance, agreement between pictures and its causes."""
    report.section("Layers, attention, agreement")
    findings = _layers(report, found, config)
    findings |= _attention(report, found, config)
    findings |= _agreement(report, found, config)
    causes, *said = _causes(report, found, config)
    return Section(findings | causes, tuple(said))


def _layers(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    n_layers, _ = found.probes[0].shape
    positive = found.coefficients.clip(0).reshape(len(found.heads), n_layers, -1).sum(2)
    some = positive.sum(1) > 0  # lasso may find nothing
    by_layer, names = positive[some] / positive[some].sum(1, keepdims=True), np.array(found.names)[some]
    mean, low, high = band(by_layer, config.seed)
    table = pd.DataFrame({"layer": range(n_layers), "share": mean, BY_PICTURE[0]: low, BY_PICTURE[1]: high})
    table[list(BY_NAME)] = np.stack(mean_interval(by_layer, config.seed, names), axis=1)
    centre = over_pictures(by_layer @ np.arange(n_layers), names.tolist(), config.seed)
    report.text(
        f"Layers are numbered from 0 to {n_layers - 1}. A layer's importance is its share of the sum of all positive "
        f"coefficients, averaged over {len(by_layer)} pictures."
    )
    figure = plots.bands(np.arange(n_layers), {"share of positive coefficients": {"": (mean, low, high)}}, "layer")
    report.figure("layers", figure, f"Importance by layer, {len(by_layer)} pictures, 95% intervals by picture")
    report.table("layers", table.assign(pictures=len(by_layer)), "Importance by layer")
    return {"mean layer of coefficients": centre}


def _attention(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    rows, findings = [], {}
    for name in (name for name in SCORES if name in found.rankings[0]):
        scores = np.stack([frame[name].to_numpy() for frame in found.rankings])
        each = np.array([_spearman(a, b) for a, b in zip(scores, found.coefficients, strict=True)])
        own = over_pictures(each, found.names, config.seed)
        of_means = _spearman(scores.mean(0), found.coefficients.mean(0))
        rows.append(row(own, score=RANKINGS[name], **{"correlation of means": of_means}))
        findings[f"Spearman of coefficients with {RANKINGS[name]}"] = own
    means = found.coefficients.mean(0)
    if "attention" in found.rankings[0]:
        attention = np.stack([frame["attention"].to_numpy() for frame in found.rankings]).mean(0)
        layers = np.array([layer for layer, _ in found.probes[0].heads])
        label = ("attention to the image (mean over text behind it)", "coefficient")
        caption = f"One point per head ({len(means)} heads), means over {len(found.heads)} pictures"
        report.figure("attention", plots.scatter(attention, means, layers, label), caption)
    else:
        report.text("Attention to the image is that of text tokens: heads of the vision tower have none to compare.")
    report.table(
        "attention",
        pd.DataFrame(rows),
        "Rank correlation of coefficients with other scores over heads: mean over pictures with intervals, and, "
        "without, that of the means over pictures",
    )
    return findings


def _agreement(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    vectors, n, names = found.coefficients, len(found.heads), np.array(found.names)
    if n < 3:
        report.text(f"Agreement between pictures needs at least three; there are {n}.")
        return {}
    same = names[:, None] == names[None]
    rows, findings = [], {}
    squares = similarities(vectors, config.top or max(1, vectors.shape[1] // 8))
    for kind, square in squares.items():
        for label, pairs in (("same name", same), ("other names", ~same)):
            estimate = mean_of_pairs(square, pairs, names)
            if estimate.n:
                number = int(np.triu(pairs, 1).sum())
                rows.append(row(estimate, similarity=kind, pairs=label, **{"number of pairs": number}))
                findings[f"{kind} between pictures, {label}"] = estimate
    report.text(
        f"Similarity of the coefficient vectors of {n} pictures with {len(set(names))} names. Intervals leave out one "
        "picture, or one name, at a time (jackknife)."
    )
    report.table("agreement", pd.DataFrame(rows), "Similarity between pictures")
    order = np.argsort(names, kind="stable")
    ordered = names[order].tolist()
    labels = [name if i == 0 or name != ordered[i - 1] else "" for i, name in enumerate(ordered)]
    figure = plots.heatmap(squares["cosine"][np.ix_(order, order)], labels, labels, ("", "", "cosine"), (-1, 1))
    report.figure("agreement", figure, f"Cosine between the coefficient vectors of {n} pictures, by name")
    return findings


def _causes(report: Report, found: Measured, config: HeadAttributionConfig) -> tuple[Any, ...]:
    """Report whether names explain agreement beyond appearance; the findings, and what can be said if anything can."""
    names = np.array(found.names)
    causes = causes_of(found.cases, found.probes[0].model)
    if SAME not in causes or len(set(names)) < 3:
        report.text(
            "Whether names or appearance explain agreement needs three names, and pairs of pictures of the same name: "
            f"there are {len(names)} pictures of {len(set(names))} names."
        )
        return ({},)
    looks = looks_of(found.cases, found.probes[0].model, config.seed)
    squares = similarities(found.coefficients, 1)
    table = explained(squares["cosine"], causes, looks, names)
    said = conclusion(table)
    report.text(
        f"{said} Appearance is measured in several ways. Each is taken twice, of every picture and of a "
        "second look at it (a little crop and noise); the correlation over pairs of pictures is its reliability. "
        "Partial correlations are corrected for it, since what a noisy measure leaves uncontrolled would count for the "
        f"name. Below a reliability of {RELIABLE} nothing is concluded."
    )
    report.table(
        "explained",
        table,
        "Cosine between coefficient vectors and the same name (or similar names: mean embeddings of their tokens), "
        "controlled for appearance: partial correlation over pairs, its interval and two-sided p (jackknife over "
        f"names), and Holm's p for the family of these {len(table)} tests",
    )
    findings: Findings = {
        f"cosine with {own['cause']}, controlled for {own['appearance']}": _partial(own)
        for own in table.to_dict("records")
        if not np.isnan(own["partial"])
    }
    return findings, said


def _partial(own: dict[Any, Any]) -> OverPictures:
    ends = (own["low, by name"], own["high, by name"])
    return OverPictures(own["partial"], np.nan, np.nan, own["pictures"], *ends, own["names"])


def _spearman(a: Any, b: Any) -> float:
    """Rank correlation; NaN where one of them is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.nan
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])
