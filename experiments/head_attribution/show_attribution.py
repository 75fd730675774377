"""Report sections on the task and on the regression."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from hooked_vlm.analysis.intervals import FEWEST, mean_interval, mean_p
from hooked_vlm.analysis.multiple_testing import holm
from hooked_vlm.analysis.statistics import Estimate, share
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.head_attribution import plots
from hooked_vlm.experiments.head_attribution.ablation import chosen
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig
from hooked_vlm.experiments.head_attribution.findings import BY_NAME, BY_PICTURE, Findings, Section, band, over_pictures
from hooked_vlm.experiments.head_attribution.masks import PAIRED
from hooked_vlm.experiments.head_attribution.measurements import Measured
from hooked_vlm.experiments.head_attribution.regression import RELIABLE, Fit, convergence, settled_at
from hooked_vlm.sweeps.plan import SweepPlan, make_plan

TARGETS = {"logit": "logit", "log_prob": "log-probability", "margin": "margin", "difference": "logit difference"}
SHOWN = 4
"""Pictures in the scatter plots."""
NAMED = 4
"""Heads named in the answer."""


def task(report: Report, found: Measured, config: HeadAttributionConfig) -> Section:
    """Report the question, how many answers are correct, and what the image adds to the target."""
    answers = found.answers
    right = share(len(found.cases), len(answers))
    full, none = (over_pictures(np.array(e), found.names, config.seed) for e in zip(*found.ends, strict=True))
    target = TARGETS[config.target]
    report.section(
        "Task",
        f"The model answers “{found.cases[0].item.question}” correctly for {len(found.cases)} of {len(answers)} "
        f"pictures ({right.value:.1%}, 95% interval {right.low:.1%} to {right.high:.1%}); the rest of this report is "
        f"about these, of {len(set(found.names))} names. Means over pictures have 95% intervals that resample "
        "pictures, and intervals that resample names of objects with all their pictures: the second are for other "
        "objects than these. Fewer than three of either have no interval, fewer than ten Student's, more a bootstrap "
        "interval (bias-corrected and accelerated).",
        f"The target is the {target} of the answer's first token. {_added(found, config)} Shares below are shares of "
        "this difference.",
    )
    table = answers.groupby("name", sort=True)["right"].agg(["size", "sum"]).reset_index()
    report.table("names", table.set_axis(["name", "pictures", "correct"], axis=1), "Correct answers by name")
    report.table("answers", answers, "All answers", shown=10)
    n_names = len(set(found.names))
    unit = "names of objects" if n_names >= FEWEST else "pictures"
    said = (
        f"{len(found.cases)} of {len(answers)} pictures were answered correctly, of {n_names} "
        f"{'name' if n_names == 1 else 'names'}; intervals here are 95% and resample {unit}."
    )
    return Section({"answered correctly": right, f"{target}, all heads": full, f"{target}, no head": none}, (said,))


def _added(found: Measured, config: HeadAttributionConfig) -> str:
    """What all heads together add to the target."""
    gap = f"{found.gaps.mean():.3f}"
    if config.tower == "language":
        return (
            f"The image adds {gap}: the difference between all heads and no head of any text token seeing it "
            f"(baseline: {config.baseline}, {config.rope} RoPE)."
        )
    written = {"mean": "its mean over the picture's patches", "dataset": "its mean over the patches of all pictures"}
    return (
        f"Attention in the vision tower adds {gap}: the difference between all of its heads in place and all of them "
        f"ablated, each writing {written.get(config.baseline, 'zero')} at every patch. What patches hold by themselves "
        "still reaches the answer then."
    )


def attribution(report: Report, found: Measured, config: HeadAttributionConfig) -> Section:
    """Report the coefficients of all heads, how well they predict held-out masks, and how reliable they are."""
    fits = [one.fit for one in found.heads]
    pearson, r2 = held_out(fits, found.names, config.seed)
    n_masks = len(found.heads[0].values)
    n_heads, target = found.coefficients.shape[1], TARGETS[config.target]
    report.section(
        "Head attribution",
        "A head's coefficient is what keeping it adds to the target, averaged over which other heads are kept. "
        f"{n_masks} masks per picture ({config.design} design), keeping a head with probability {config.keep:g}: the "
        f"{target} is regressed on {fits[0].n_train} masks ({config.regression}) and predicted for the other "
        f"{fits[0].n_held_out}. {_intervals(config)}",
    )
    report.figure("predicted", _predicted(found, target), f"Held-out masks of {min(SHOWN, len(fits))} pictures")
    table = heads_table(found, config)
    means = found.coefficients.mean(0).reshape(found.probes[0].shape)
    labels = ("layer", "head", f"coefficient ({target})")
    figure = plots.heatmap(means, range(len(means)), range(means.shape[1]), labels)
    report.figure("coefficients", figure, f"Mean coefficient of every head over {len(fits)} pictures")
    report.table(
        "heads",
        table,
        f"Heads by mean coefficient over {len(fits)} pictures. p: two-sided t test by {unit_of(found)}; adjusted: "
        f"Holm's for the family of {n_heads} heads. Pictures above 0: those whose own 95% interval lies above 0, which "
        f"{0.025 * len(fits):.1f} do by chance for a head without an effect",
        shown=16,
    )
    per_image = pd.DataFrame(
        {
            "image": found.images,
            "name": found.names,
            "pearson": [f.pearson for f in fits],
            "r2": [f.r2 for f in fits],
            "intercept": [f.intercept for f in fits],
            "masks": [f.n_train for f in fits],
            "held_out": [f.n_held_out for f in fits],
        }
    )
    report.table("fits", per_image, "Regression of every picture", shown=10)
    report.table(
        "coefficients",
        _all_coefficients(found),
        f"All coefficients, 95% intervals over {fits[0].n_train} masks",
        shown=10,
    )
    settled = _convergence(report, found, config)
    _cost(report, found, config, n_heads)
    return Section({"held-out Pearson": pearson, "held-out R²": r2} | settled, (_named_heads(table, found, target),))


def _named_heads(table: pd.DataFrame, found: Measured, target: str) -> str:
    """The heads with the largest mean coefficients, of those that are not 0 by Holm's p, for the answer."""
    positive = table.loc[table["coefficient"] > 0]
    certain = positive.loc[positive["adjusted p"] <= 0.05]
    columns = BY_NAME if unit_of(found) == "name" else BY_PICTURE
    seen = " when they see the image" if found.probes[0].tower == "language" else ""
    told = []
    for own in (certain if len(certain) else positive).head(NAMED).to_dict("records"):
        low, high = (own[column] for column in columns)
        interval = "" if np.isnan(low) else f", {low:.2f} to {high:.2f}"
        told.append(f"{own['layer']}.{own['head']} ({own['coefficient']:.2f}{interval})")
    if not told:
        return f"No head adds to the answer{' when it sees the image' if seen else ''}."
    counted = f"{len(certain)} of {len(table)} heads are above 0 (p <= 0.05, Holm)"
    of = "Heads" if seen else "Heads of the vision tower"
    return f"{of} that add most to the {target} of the name{seen}: {', '.join(told)}; {counted}."


def held_out(fits: Sequence[Fit], names: Sequence[str], seed: int) -> tuple[Estimate, Estimate]:
    """Pearson correlation and R² on held-out masks, means over pictures."""
    pearson, r2 = (
        over_pictures(np.array([getattr(fit, own) for fit in fits]), names, seed) for own in ("pearson", "r2")
    )
    return pearson, r2


def _intervals(config: HeadAttributionConfig) -> str:
    """How each picture's intervals are made."""
    if config.regression == "lasso":
        return f"Intervals of a picture's coefficients resample its masks {config.bootstrap} times."
    together = "pairs of masks" if PAIRED[config.design] > 1 else "masks"
    return f"Intervals of a picture's coefficients are robust to uneven noise (residuals that leave {together} out)."


def unit_of(found: Measured) -> str:
    """Unit over which heads are tested: names, or pictures where there are fewer than three names."""
    return "name" if len(set(found.names)) >= FEWEST else "picture"


def heads_table(found: Measured, config: HeadAttributionConfig) -> pd.DataFrame:
    """One row per head, largest first: mean over pictures with its intervals, p, Holm's p, and the number of pictures
    with an interval above 0."""
    names = np.array(found.names)
    heads = pd.DataFrame(found.probes[0].heads, columns=["layer", "head"])
    heads["coefficient"] = found.coefficients.mean(0)
    for columns, groups in ((BY_PICTURE, None), (BY_NAME, names)):
        heads[list(columns)] = np.stack(mean_interval(found.coefficients, config.seed, groups), axis=1)
    heads["p"] = mean_p(found.coefficients, names if unit_of(found) == "name" else None)
    heads["adjusted p"] = holm(heads["p"].to_numpy())
    heads["pictures above 0"] = (np.stack([one.fit.low for one in found.heads]) > 0).sum(0)
    heads["pictures"] = len(found.heads)
    return heads.sort_values("coefficient", ascending=False, kind="stable", ignore_index=True)


def _predicted(found: Measured, target: str) -> Any:
    panels = []
    for one, name in list(zip(found.heads, found.names, strict=True))[:SHOWN]:
        held = slice(-one.fit.n_held_out, None)
        expected = one.fit.intercept + one.kept[held] @ one.fit.coefficients
        panels.append((f"{name}: r = {one.fit.pearson:.3f}, n = {one.fit.n_held_out}", expected, one.values[held]))
    return plots.predicted(panels, target)


def _all_coefficients(found: Measured) -> pd.DataFrame:
    heads = pd.DataFrame(found.probes[0].heads, columns=["layer", "head"])
    frames = []
    for image, one in zip(found.images, found.heads, strict=True):
        frame = heads.assign(coefficient=one.fit.coefficients, low=one.fit.low, high=one.fit.high)
        frame.insert(0, "image", image)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _convergence(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    group = PAIRED[config.design]
    curves = [
        convergence(one.kept, one.values, config.regression, config.held_out, one.fit.penalty, group)
        for one in found.heads
    ]
    sizes = curves[0]["n"].to_numpy()
    panels = {
        label: {"all": band([curve[name] for curve in curves], config.seed)}
        for name, label in (("reliability", "reliability of coefficients"), ("r2", "held-out R²"))
    }
    needed = np.array([settled_at(curve) for curve in curves])
    half = over_pictures(np.array([c["reliability"].iloc[-1] for c in curves]), found.names, config.seed)
    settled = over_pictures(needed, found.names, config.seed)
    enough = f"The correlation stays above {RELIABLE} on {settled.n} of {len(curves)} pictures."
    if settled.n < len(curves):
        enough += f" For the others {sizes[-1]} masks are too few: use more --masks."
    report.text(
        f"Coefficients from two disjoint sets of {sizes[-1]} masks are correlated. By the formula of Spearman and "
        f"Brown, those from all {found.heads[0].fit.n_train} masks have a reliability of "
        f"{2 * half.value / (1 + half.value):.3f}. {enough}"
    )
    figure = plots.bands(sizes, panels, "masks", {next(iter(panels)): RELIABLE})
    caption = f"Reliability and prediction by number of masks, {len(curves)} pictures"
    report.figure("convergence", figure, caption)
    frames = [curve.assign(image=image) for image, curve in zip(found.images, curves, strict=True)]
    report.table("convergence", pd.concat(frames, ignore_index=True), "Convergence of every picture", shown=8)
    return {"reliability of half the masks": half, "masks needed for reliable coefficients": settled}


def _cost(report: Report, found: Measured, config: HeadAttributionConfig, n_heads: int) -> None:
    probe, one = found.probes[0], found.heads[0]
    inputs = probe.case.inputs
    runs = [probe.ablated(chosen(probe.heads, ~own)) for own in one.kept]
    plan = make_plan(probe.model, inputs, runs, "last")
    passes = plan.work / (plan.n_layers * plan.n_positions)
    report.text(
        f"The masks of one picture cost {passes:.1f} plain forward passes: {plan.n_runs} runs over {n_heads} heads on "
        f"{plan.n_positions} tokens ({len(probe.image)} of the image, {len(probe.text)} behind it) compute "
        f"{plan.work:,} positions x layers. A loop computes {plan.naive_work:,}, "
        f"{plan.naive_work / plan.work:.1f} times as many, and {_encoding(plan)}."
    )


def _encoding(plan: SweepPlan) -> str:
    """What a loop computes in the vision tower."""
    if not plan.vision_work:
        return "encodes the picture for every mask"
    fewer = plan.naive_vision_work / plan.vision_work
    return (
        f"{plan.naive_vision_work:,} patches x layers of the vision tower, {fewer:.1f} times as many as the sweep's "
        f"{plan.vision_work:,}"
    )
