"""Report sections on token flow (which text receives image information, in what order) and on image tokens."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hooked_vlm.analysis.intervals import mean_p
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.head_attribution import plots
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig
from hooked_vlm.experiments.head_attribution.curves import (
    LEVELS,
    MIN_GAP,
    NEEDED,
    gains,
    measures_of_all,
    shares,
    sizes,
)
from hooked_vlm.experiments.head_attribution.findings import (
    Findings,
    OverPictures,
    Section,
    from_table_row,
    over_pictures,
    ratio_band,
    ratio_over_pictures,
    row,
)
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


def tokens(report: Report, found: Measured, config: HeadAttributionConfig) -> Section:
    """Report which text receives image information, in what order, and which image tokens matter."""
    n_pictures = len(found.gaps)
    report.section(
        "Token flow",
        "A loss is a share of the image's effect on the target (1: as if no text saw the image): a ratio of means over "
        f"the {n_pictures} pictures.",
    )
    if not (found.gaps >= MIN_GAP).any():
        return Section({}, ("The image adds too little to the answer on every picture to follow its flow.",))
    findings = _receivers(report, found, config)
    lost = {name.removeprefix(LOST): own for name, own in findings.items() if name.startswith(LOST)}
    most = max(lost, key=lambda name: lost[name].value)
    own = lost[most]
    assert isinstance(own, OverPictures)
    said = f"Text that most needs to see the image: {most} (share of the image's effect lost otherwise: {own.brief})."
    findings |= _edges(report, found, config)
    findings |= _image(report, found, config)
    return Section(findings, () if found.heads else (said,))  # of a run with heads, these are the answer


def _estimates(frames: Sequence[pd.DataFrame], found: Measured, keys: list[str], seed: int) -> pd.DataFrame:
    """Loss over pictures for every value of `keys`: mean loss in units of the target, over the mean gap."""
    losses = zip(frames, found.ends, found.gaps, found.names, strict=True)
    together = pd.concat(
        [frame.assign(loss=full - frame["value"], gap=gap, name=name) for frame, (full, _), gap, name in losses],
        ignore_index=True,
    )
    rows = []
    for key, own in together.groupby(keys, sort=False):
        assert isinstance(key, tuple)
        labels = dict(zip(keys, key, strict=True))
        estimate = ratio_over_pictures(own["loss"].to_numpy(), own["gap"].to_numpy(), own["name"].tolist(), seed)
        rows.append(row(estimate, **labels))
    return pd.DataFrame(rows)


def _receivers(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    n_layers, n_pictures = found.probes[0].model.cfg.n_layers, len(found.gaps)
    table = _estimates(found.receivers, found, ["text", "change", "first", "stop"], config.seed)
    groups: dict[str, dict[str, OverPictures]] = {}
    each: dict[str, dict[str, OverPictures]] = {}
    for own in table.query(f"first == 0 and stop == {n_layers}").to_dict("records"):
        lost = from_table_row(own)
        assert isinstance(lost, OverPictures)
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
    caption = f"Share of the image's effect that is lost or kept; {n_pictures} pictures, 95% intervals by picture"
    report.figure("receivers", plots.bars(groups, "share of the image's effect"), caption)
    caption = f"Share lost when one token does not see the image; {n_pictures} pictures, 95% intervals by picture"
    report.figure("single_tokens", plots.bars(each, "share lost"), caption)
    sliding = table.query(f"stop - first < {n_layers}")
    if len(sliding):
        grid = sliding.pivot_table(index="text", columns="first", values="value", sort=False)
        widths = _windows(sliding)
        figure = plots.heatmap(grid.to_numpy(), list(grid.index), widths, *SHARE_LOST)
        caption = f"Share lost by group and window of layers; {n_pictures} pictures"
        report.figure("receivers_by_layer", figure, caption)
    report.table("receivers", table, "Loss by text tokens and layers (first to stop - 1)", shown=24)
    findings: Findings = {f"{LOST}{name}": own[ABLATED] for name, own in groups.items()}
    return findings | {f"share kept if only this sees the image: {name}": own[ALONE] for name, own in groups.items()}


def _edges(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    n_layers = found.probes[0].model.cfg.n_layers
    frames = [frame.assign(edge=frame["source"] + " → " + frame["receiver"]) for frame in found.edges]
    table = _estimates(frames, found, ["edge", "first", "stop"], config.seed)
    edges = list(dict.fromkeys(table["edge"]))
    centres = {edge: _centres(frames, found, edge, n_layers) for edge in edges}
    sliding = table.query(f"stop - first < {n_layers}")
    report.text(
        "Order of the flow: attention from one group to another is blocked in a window of layers. An edge's mean layer "
        "is the mean centre of the windows, weighted by the loss; a picture on which all windows together lose less "
        f"than {MIN_LOSS:.0%} of the image's effect, or to which the image adds less than {MIN_GAP}, has none. Blocked "
        "scores are minus infinity, for any baseline." + _handed_on(found)
    )
    if len(sliding):
        grid = sliding.pivot_table(index="edge", columns="first", values="value", sort=False)
        figure = plots.heatmap(grid.to_numpy(), list(grid.index), _windows(sliding), *SHARE_LOST)
        caption = f"Share lost by blocked edge and window of layers; {len(frames)} pictures"
        report.figure("edges", figure, caption)
    report.table("edges", table, "Loss by blocked edge and layers (first to stop - 1)", shown=30)
    means = {edge: over_pictures(values, found.names, config.seed) for edge, values in centres.items()}
    rows = [row(estimate, edge=edge) for edge, estimate in means.items() if estimate.n]
    if rows:
        caption = f"Mean layer of edges, over the pictures that have one; {len(edges) - len(rows)} edges have none"
        report.table("edge_layers", pd.DataFrame(rows), caption)
    findings: Findings = {f"mean layer: {edge}": estimate for edge, estimate in means.items()}
    early, late = "question → assistant header", "image → assistant header"
    if early in centres and late in centres:
        apart = centres[late] - centres[early]
        difference = over_pictures(apart, found.names, config.seed)
        order = f"The paper compares the order of {early} and {late}; no picture has a mean layer for both."
        if difference.n:
            known = ~np.isnan(apart)
            p = float(mean_p(apart[known], np.array(found.names)[known]))
            order = (
                f"{late} is compared with {early}, paired over pictures (p = {p:.3g}, two-sided t test over names). In "
                "the paper, these tokens receive information from the question first and from the image later."
            )
        report.text(order)
        findings[f"layers from {early} to {late}"] = difference
    return findings


def _handed_on(found: Measured) -> str:
    """What a blocked edge leaves open where image tokens see the text."""
    if found.probes[0].model.cfg.bidirectional != "prompt":
        return ""
    return (
        " The tokens of this model's prompts see each other both ways: image tokens read the question, too, and can "
        "hand it on, so that a blocked edge cuts the direct way alone, and what comes from the image later may hold "
        "what the text says."
    )


def _image(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    n_tokens = len(found.probes[0].image)
    fits = [one.fit for one in found.tokens]
    pearson, r2 = held_out(fits, found.names, config.seed)
    report.section(
        "Image tokens",
        f"The same regression over image tokens ({fits[0].n_held_out} of {len(found.tokens[0].values)} masks per "
        f"picture are held out; {n_tokens} tokens in the first picture). For every head of all text, the baseline "
        "replaces a token that is not kept.",
    )
    shown = []
    for probe, one in list(zip(found.probes, found.tokens, strict=True))[:SHOWN]:
        places = [probe.case.inputs.box_of_token(position) for position in probe.image]
        values = zip(places, one.fit.coefficients.tolist(), strict=True)
        boxes = [(box, value) for box, value in values if box is not None]
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
        (one.fit.coefficients, covered, probe.case.item.name)
        for probe, one in zip(found.probes, found.tokens, strict=True)
        if (covered := coverage(probe)) is not None
    ]
    if not placed:
        report.text("The object's location is unknown for these pictures, so tokens are not compared with it.")
        return {}
    rows, findings = [], {}
    for overlap in sorted({config.object_overlap, *OVERLAPS}):
        each = pd.DataFrame([inside(coefficients, covered > overlap) for coefficients, covered, _ in placed])
        for name in each:
            estimate = over_pictures(each[name].to_numpy(), [own for *_, own in placed], config.seed)
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
    alike = [i for i, n in enumerate(counts) if n == n_tokens]
    own = {found.images[i]: shares(found.token_curves[i]) for i in alike}
    names, gaps = [found.names[i] for i in alike], found.gaps[alike]
    everywhere = set.intersection(*(set(frame["ranking"]) for frame in own.values()))
    rankings = [name for name in TOKEN_RANKINGS if name in everywhere]
    ms = sizes(n_tokens)
    panels = {
        f"{kind} (top m {verb})": {
            TOKEN_RANKINGS[name]: ratio_band(
                np.stack([gains(own, name, kind) for own in own.values()]), gaps, config.seed
            )
            for name in rankings
        }
        for kind, verb in (("faithfulness", "kept"), ("completeness", "replaced"))
    }
    caption = f"Only the top m of {n_tokens} tokens kept, or these replaced; ratios of means over {len(own)} pictures"
    report.figure("keep_only", plots.bands(ms, panels, "m (image tokens)", dict.fromkeys(panels, LEVELS[0])), caption)
    table = measures_of_all(own, rankings, "tokens")
    rows, findings = [], {}
    for name in rankings:
        for level in LEVELS:
            measure = NEEDED.format(units="tokens", level=level, of="faithfulness")
            needed = over_pictures(table.loc[table["ranking"] == name, measure].to_numpy(), names, config.seed)
            rows.append(row(needed, ranking=TOKEN_RANKINGS[name], level=level, of=n_tokens))
            findings[f"{measure}, {TOKEN_RANKINGS[name]}"] = needed
    report.table("keep_only", pd.DataFrame(rows), "Tokens to keep (smallest m measured) for each level of faithfulness")
    return findings


def _centres(frames: Sequence[pd.DataFrame], found: Measured, edge: str, n_layers: int) -> np.ndarray:
    """Mean layer of an edge on every picture; NaN where it has none."""
    centres = []
    for frame, (full, none) in zip(frames, found.ends, strict=True):
        own = with_losses(frame.query(f"edge == '{edge}'"), full, full - none) if full - none >= MIN_GAP else None
        centres.append(np.nan if own is None else mean_layer(own, n_layers))
    return np.array(centres)


def _kept(lost: OverPictures) -> OverPictures:
    named = (1 - lost.high_by_name, 1 - lost.low_by_name, lost.names)
    return OverPictures(1 - lost.value, 1 - lost.high, 1 - lost.low, lost.n, *named)


def _windows(table: pd.DataFrame) -> list[str]:
    """Name windows of layers: "3", or "3-6"."""
    ends = table[["first", "stop"]].drop_duplicates().itertuples(index=False)
    return [str(first) if stop == first + 1 else f"{first}-{stop - 1}" for first, stop in ends]
