"""Report sections on the task and on the regression."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from hooked_vlm.analysis.statistics import Estimate, bootstrap_mean, share
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.experiments.head_attribution import plots
from hooked_vlm.experiments.head_attribution.ablation import chosen
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig
from hooked_vlm.experiments.head_attribution.findings import Findings, band
from hooked_vlm.experiments.head_attribution.measurements import Measured
from hooked_vlm.experiments.head_attribution.regression import RELIABLE, Fit, convergence, settled_at
from hooked_vlm.sweeps.plan import make_plan

TARGETS = {"logit": "logit", "log_prob": "log-probability", "margin": "margin", "difference": "logit difference"}
SHOWN = 4
"""Pictures in the scatter plots."""


def task(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    """Report the question, how many answers are correct, and what the image adds to the target."""
    answers = found.answers
    right = share(len(found.cases), len(answers))
    full, none = (bootstrap_mean(np.array(ends), config.seed) for ends in zip(*found.ends, strict=True))
    gap = bootstrap_mean(found.gaps, config.seed)
    target = TARGETS[config.target]
    report.section(
        "Task",
        f"The model answers “{found.cases[0].item.question}” correctly for {len(found.cases)} of {len(answers)} "
        f"pictures ({right.value:.1%}, 95% interval {right.low:.1%} to {right.high:.1%}); the rest of this report is "
        "about these. Intervals of means are bootstrap intervals over pictures.",
        f"The image adds {gap} to the target, the {target} of the answer's first token: {full} with all heads, {none} "
        f"when no head of any text token sees the image (baseline: {config.baseline}, {config.rope} RoPE). Shares "
        "below are shares of this difference.",
    )
    table = answers.groupby("name", sort=True)["right"].agg(["size", "sum"]).reset_index()
    report.table("names", table.set_axis(["name", "pictures", "correct"], axis=1), "Correct answers by name")
    report.table("answers", answers, "All answers", shown=10)
    return {"answered correctly": right, f"{target}, all heads": full, f"{target}, no head": none}


def attribution(report: Report, found: Measured, config: HeadAttributionConfig) -> Findings:
    """Report the coefficients of all heads, how well they predict held-out masks, and how reliable they are."""
    fits = [one.fit for one in found.heads]
    pearson, r2 = held_out(fits, config.seed)
    n_masks = len(found.heads[0].values)
    n_heads, target = found.coefficients.shape[1], TARGETS[config.target]
    report.section(
        "Head attribution",
        f"The regression predicts held-out masks with Pearson correlation {pearson}, R² {r2} (means over pictures). A "
        "head's coefficient is what keeping it adds to the target, averaged over which other heads are kept. "
        f"{n_masks} random masks per picture, each keeping a head with probability {config.keep:g}: the {target} is "
        f"regressed on {fits[0].n_train} masks ({config.regression}) and predicted for the other "
        f"{fits[0].n_held_out}.",
    )
    report.figure("predicted", _predicted(found, target), f"Held-out masks of {min(SHOWN, len(fits))} pictures")
    table = heads_table(found, config)
    shape = (found.probes[0].model.cfg.n_layers, -1)
    means = found.coefficients.mean(0).reshape(shape)
    labels = ("layer", "head", f"coefficient ({target})")
    figure = plots.heatmap(means, range(len(means)), range(means.shape[1]), labels)
    report.figure("coefficients", figure, f"Mean coefficient of every head over {len(fits)} pictures")
    report.table("heads", table, f"Heads by mean coefficient over {len(fits)} pictures, with 95% intervals", shown=16)
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
    return {"held-out Pearson": pearson, "held-out R²": r2} | settled


def held_out(fits: Sequence[Fit], seed: int) -> tuple[Estimate, Estimate]:
    """Pearson correlation and R² on held-out masks, means over pictures."""
    pearson, r2 = (bootstrap_mean(np.array([getattr(fit, name) for fit in fits]), seed) for name in ("pearson", "r2"))
    return pearson, r2


def heads_table(found: Measured, config: HeadAttributionConfig) -> pd.DataFrame:
    """One row per head, largest first: mean over images, its interval, and the number of images with an interval
    above 0."""
    mean, low, high = band(found.coefficients, config.seed)
    above = (np.stack([one.fit.low for one in found.heads]) > 0).sum(0)
    heads = pd.DataFrame(found.probes[0].heads, columns=["layer", "head"])
    heads = heads.assign(coefficient=mean, low=low, high=high)
    heads = heads.assign(**{"images above 0": above, "n": len(found.heads)})
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
    curves = [convergence(one.kept, one.values, config.regression, config.held_out) for one in found.heads]
    sizes = curves[0]["n"].to_numpy()
    panels = {
        label: {"all": band([curve[name] for curve in curves], config.seed)}
        for name, label in (("reliability", "reliability of coefficients"), ("r2", "held-out R²"))
    }
    needed = np.array([settled_at(curve) for curve in curves])
    half = bootstrap_mean(np.array([curve["reliability"].iloc[-1] for curve in curves]), config.seed)
    value, low, high = (2 * r / (1 + r) for r in (half.value, half.low, half.high))
    whole = Estimate(value, low, high, half.n)
    settled = bootstrap_mean(needed, config.seed)
    enough = f"The correlation stays above {RELIABLE} on none of {len(curves)} pictures: use more --masks."
    if settled.n:
        enough = (
            f"The correlation stays above {RELIABLE} on {settled.n} of {len(curves)} pictures, after {settled} masks."
        )
    report.text(
        f"Coefficients from two disjoint sets of {sizes[-1]} masks correlate by {half}; the estimate for all "
        f"{found.heads[0].fit.n_train} masks is {whole} (Spearman–Brown). {enough}"
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
        f"{plan.naive_work / plan.work:.1f} times as many, and encodes the picture for every mask."
    )
