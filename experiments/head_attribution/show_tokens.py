"""Report sections on token flow (which text receives image information, in what order) and on image tokens."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hooked_vlm.analysis.statistics import Estimate, bootstrap_mean, paired_p
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.head_attribution import plots
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig
from hooked_vlm.experiments.head_attribution.curves import LEVELS, MIN_GAP, mean_curve, measures_of_all, shares, sizes
from hooked_vlm.experiments.head_attribution.findings import Findings, band, row
from hooked_vlm.experiments.head_attribution.image_flow import TOP_SHARE, coverage, inside
from hooked_vlm.experiments.head_attribution.measurements import Measured
from hooked_vlm.experiments.head_attribution.show_attribution import held_out
from hooked_vlm.experiments.head_attribution.text_flow import MIN_LOSS, mean_layer, with_losses

TOKEN_RANKINGS = {
    "attribution": "token attribution",
    "attention": "attention of the final token",
    "object": "share of the object",
    "random": "random",
}
ABLATED, ALONE = "lost when it does not see the image", "kept when it alone sees the image"
LOST = "share lost if this does not see the image: "
"""Findings about a group of text begin with this."""
OVERLAPS = (0.1, 0.25, 0.5)
"""Shares of a token's area above which it counts as part of the object."""
SHARE_LOST = ("", "layers", "share lost"), (-1, 1)
"""Labels and scale of heatmaps, the same so that they compare."""
SHOWN = 8
"""Pictures drawn with their token coefficients."""


def tokens(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    """Report which text receives image information, in what order, and which image tokens matter."""
    usable = found.gaps >= MIN_GAP
    report.section(
        "Token flow",
        "A loss is a share of the image's effect on the target (1: as if no text saw the image). "
        f"{int(usable.sum())} of {len(usable)} pictures count: those to which the image adds at least {MIN_GAP}.",
    )
    if not usable.any():
        return {}
    findings = _receivers(report, found, config, usable)
    findings |= _edges(report, found, config, usable)
    return findings | _image(report, found, config)


def _losses(frames: Sequence[pd.DataFrame], found: Measured, usable: np.ndarray) -> list[pd.DataFrame]:
    chosen = zip(frames, found.ends, usable, strict=True)
    return [with_losses(frame, full, full - none) for frame, (full, none), use in chosen if use]


def _estimates(frames: Sequence[pd.DataFrame], keys: list[str], seed: int) -> pd.DataFrame:
    """Mean loss over pictures, with its interval, for every value of `keys`."""
    together = pd.concat(frames, ignore_index=True)
    rows = []
    for key, own in together.groupby(keys, sort=False):
        assert isinstance(key, tuple)
        labels = dict(zip(keys, key, strict=True))
        rows.append(row(bootstrap_mean(own["loss"].to_numpy(), seed), **labels))
    return pd.DataFrame(rows)


def _receivers(report: Report, found: Measured, config: HeadAttributionConfig, usable: np.ndarray) -> Findings:
    n_layers = found.probes[0].model.cfg.n_layers
    table = _estimates(_losses(found.receivers, found, usable), ["text", "change", "first", "stop"], config.seed)
    groups: dict[str, dict[str, Estimate]] = {}
    each: dict[str, dict[str, Estimate]] = {}
    for own in table.query(f"first == 0 and stop == {n_layers}").to_dict("records"):
        lost = Estimate(own["value"], own["low"], own["high"], own["n"])
        if own["change"] == "one token ablated":
            each[own["text"]] = {"": lost}
        elif own["change"] == "ablated":
            groups.setdefault(own["text"], {})[ABLATED] = lost
        else:
            groups.setdefault(own["text"], {})[ALONE] = _kept(lost)
    report.text(
        "Which text receives image information: for all heads, one group of tokens does not see the image, or it alone "
        "does; then single tokens. (A group that does not see the image may still receive its information from another "
        "group.)"
    )
    caption = f"Share of the image's effect that is lost or kept; {int(usable.sum())} pictures, 95% intervals"
    report.figure("receivers", plots.bars(groups, "share of the image's effect"), caption)
    caption = f"Share lost when one token does not see the image; {int(usable.sum())} pictures, 95% intervals"
    report.figure("single_tokens", plots.bars(each, "share lost"), caption)
    sliding = table.query(f"stop - first < {n_layers}")
    if len(sliding):
        grid = sliding.pivot_table(index="text", columns="first", values="value", sort=False)
        widths = _windows(sliding)
        figure = plots.heatmap(grid.to_numpy(), list(grid.index), widths, *SHARE_LOST)
        caption = f"Share lost by group and window of layers; means over {int(usable.sum())} pictures"
        report.figure("receivers_by_layer", figure, caption)
    report.table("receivers", table, "Loss by text tokens and layers (first to stop - 1)", shown=24)
    lost = {f"{LOST}{name}": own[ABLATED] for name, own in groups.items()}
    return lost | {f"share kept if only this sees the image: {name}": own[ALONE] for name, own in groups.items()}


def _edges(report: Report, found: Measured, config: HeadAttributionConfig, usable: np.ndarray) -> Findings:
    n_layers = found.probes[0].model.cfg.n_layers
    frames = [
        frame.assign(edge=frame["source"] + " → " + frame["receiver"]) for frame in _losses(found.edges, found, usable)
    ]
    table = _estimates(frames, ["edge", "first", "stop"], config.seed)
    edges = list(dict.fromkeys(table["edge"]))
    centres = {
        edge: np.array([mean_layer(frame.query(f"edge == '{edge}'"), n_layers) for frame in frames]) for edge in edges
    }
    sliding = table.query(f"stop - first < {n_layers}")
    report.text(
        "Order of the flow: attention from one group to another is blocked in a window of layers. An edge's mean layer "
        "is the mean centre of the windows, weighted by the loss; a picture on which all windows together lose less "
        f"than {MIN_LOSS:.0%} of the image's effect has none. Blocked scores are minus infinity, for any baseline."
    )
    if len(sliding):
        grid = sliding.pivot_table(index="edge", columns="first", values="value", sort=False)
        figure = plots.heatmap(
            grid.to_numpy(), list(grid.index), _windows(sliding), ("", "layers", "share lost"), (-1, 1)
        )
        caption = f"Share lost by blocked edge and window of layers; means over {len(frames)} pictures"
        report.figure("edges", figure, caption)
    report.table("edges", table, "Loss by blocked edge and layers (first to stop - 1)", shown=30)
    means = {edge: bootstrap_mean(values, config.seed) for edge, values in centres.items()}
    rows = [row(estimate, edge=edge) for edge, estimate in means.items()]
    report.table("edge_layers", pd.DataFrame(rows), "Mean layer of every edge; n counts the pictures that have one")
    findings = {f"mean layer: {edge}": estimate for edge, estimate in means.items()}
    early, late = "question → assistant header", "image → assistant header"
    if early in centres and late in centres:
        difference = bootstrap_mean(centres[late] - centres[early], config.seed)
        order = f"The paper compares the order of {early} and {late}; no picture has a mean layer for both."
        if difference.n:
            p = paired_p(centres[late], centres[early], config.seed)
            order = (
                f"{late} comes {difference} layers after {early} (paired over pictures, p = {p:.3g}). In the paper, "
                "these tokens receive information from the question first and from the image later."
            )
        report.text(order)
        findings[f"layers from {early} to {late}"] = difference
    return findings


def _image(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    n_tokens = len(found.probes[0].image)
    fits = [one.fit for one in found.tokens]
    pearson, r2 = held_out(fits, config.seed)
    report.section(
        "Image tokens",
        f"The same regression over image tokens predicts held-out masks with Pearson correlation {pearson}, R² {r2} "
        f"({fits[0].n_held_out} of {len(found.tokens[0].values)} masks per picture; {n_tokens} tokens in the first "
        "picture). For every head of all text, the baseline replaces a token that is not kept.",
    )
    shown = []
    for probe, one in list(zip(found.probes, found.tokens, strict=True))[:SHOWN]:
        places = [probe.case.inputs.box_of_token(position) for position in probe.image]
        boxes = list(zip(places, one.fit.coefficients.tolist(), strict=True))
        boxes.sort(key=lambda item: item[0][0] - item[0][2])  # a thumbnail's large tokens below the tiles' small ones
        shown.append((probe.case.item.name, probe.case.item.image, boxes))
    report.figure(
        "image_tokens", plots.pictures(shown, "coefficient"), f"Coefficients of {len(shown)} pictures' tokens"
    )
    findings = {"held-out Pearson, image tokens": pearson, "held-out R², image tokens": r2}
    findings |= _inside(report, found, config)
    return findings | _keep_only(report, found, config)


def _inside(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    placed = [
        (one.fit.coefficients, covered)
        for probe, one in zip(found.probes, found.tokens, strict=True)
        if (covered := coverage(probe)) is not None
    ]
    if not placed:
        report.text("The object's location is unknown for these pictures, so tokens are not compared with it.")
        return {}
    rows, findings = [], {}
    for overlap in sorted({config.object_overlap, *OVERLAPS}):
        each = pd.DataFrame([inside(coefficients, covered > overlap) for coefficients, covered in placed])
        for name in each:
            estimate = bootstrap_mean(each[name].to_numpy(), config.seed)
            rows.append(row(estimate, **{"object covers more than": overlap, "measure": name}))
            if overlap == config.object_overlap:
                findings[f"object tokens: {name}"] = estimate
    report.text(
        f"A token belongs to the object if more than {config.object_overlap:.0%} of its area does (the table has other "
        f"shares). The top tokens are the {TOP_SHARE:.0%} with the largest coefficients. AUC is the probability that "
        "an object token has a larger coefficient than a background token (chance: 0.5)."
    )
    report.table("inside", pd.DataFrame(rows), "The object's share of the important tokens; means over pictures")
    return findings


def _keep_only(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    """Report curves over the number of tokens kept, for pictures with the most common number of tokens."""
    counts = [len(probe.image) for probe in found.probes]
    n_tokens = max(set(counts), key=counts.count)
    alike = zip(found.images, found.token_curves, counts, strict=True)
    own = {image: shares(frame) for image, frame, n in alike if n == n_tokens}
    everywhere = set.intersection(*(set(frame["ranking"]) for frame in own.values()))
    rankings = [name for name in TOKEN_RANKINGS if name in everywhere]
    ms = sizes(n_tokens)
    panels = {
        f"{kind} (top m {verb})": {
            TOKEN_RANKINGS[name]: band([mean_curve(frame, name, kind) for frame in own.values()], config.seed)
            for name in rankings
        }
        for kind, verb in (("faithfulness", "kept"), ("completeness", "replaced"))
    }
    n_used = sum(frame["faithfulness"].notna().all() for frame in own.values())
    caption = f"Only the top m of {n_tokens} tokens kept, or these replaced; means over {n_used} pictures"
    report.figure("keep_only", plots.bands(ms, panels, "m (image tokens)", dict.fromkeys(panels, LEVELS[0])), caption)
    table = measures_of_all(own, rankings, "tokens")
    rows, findings = [], {}
    for name in rankings:
        for level in LEVELS:
            measure = f"tokens needed for {level:g} of faithfulness"
            needed = bootstrap_mean(table.loc[table["ranking"] == name, measure].to_numpy(), config.seed)
            rows.append(row(needed, ranking=TOKEN_RANKINGS[name], level=level, of=n_tokens))
            findings[f"{measure}, {TOKEN_RANKINGS[name]}"] = needed
    report.table("keep_only", pd.DataFrame(rows), "Tokens to keep (smallest m measured) for each level of faithfulness")
    return findings


def _kept(lost: Estimate) -> Estimate:
    return Estimate(1 - lost.value, 1 - lost.high, 1 - lost.low, lost.n)


def _windows(table: pd.DataFrame) -> list[str]:
    """Name windows of layers: "3", or "3-6"."""
    ends = table[["first", "stop"]].drop_duplicates().itertuples(index=False)
    return [str(first) if stop == first + 1 else f"{first}-{stop - 1}" for first, stop in ends]
