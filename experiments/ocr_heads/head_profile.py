"""Experiment: sparsity of OCR heads, difference from retrieval heads, activation frequency.

The paper's three findings (papers 1.7 to 1.9): OCR heads are less sparse, qualitatively distinct, and statically
activated. Both kinds of head are measured at the same granularity; otherwise the third holds by definition, because
scores of single tokens are 0 or 1, so that a head's frequency equals its mean.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from hooked_vlm.analysis.statistics import half_sampling
from hooked_vlm.experiments.common.frames import each_row
from hooked_vlm.experiments.ocr_heads import plots
from hooked_vlm.experiments.ocr_heads.config import Granularity, SelectConfig
from hooked_vlm.experiments.ocr_heads.position_null import PositionNull, null_of_positions
from hooked_vlm.experiments.ocr_heads.published import RANGES, per_range, published_models, range_of
from hooked_vlm.experiments.ocr_heads.scoring import Scores
from hooked_vlm.experiments.ocr_heads.selection import select
from hooked_vlm.experiments.ocr_heads.similarity import Measure, compare_scores, jaccard, measures
from hooked_vlm.experiments.ocr_heads.study import Finding, Study, head_names, head_table

GRANULARITIES: tuple[Granularity, ...] = ("sample", "token")
RULES: tuple[Literal["active", "inverted"], ...] = ("active", "inverted")


def profile(study: Study, config: SelectConfig) -> Finding:
    """Compare OCR and retrieval heads: selection, sparsity, similarity, activation."""
    ocr, retrieval = study.ocr, study.retrieval
    chosen = {"ocr": study.selected(ocr), "retrieval": study.selected(retrieval)}
    both = chosen["ocr"] & chosen["retrieval"]
    sparsity, similarity = sparsity_table(study), similarity_table(study, config)
    activation = activation_table(study)
    null = null_of_positions(ocr, config.seed, config.permutations)
    by_position = {} if null is None else {"ocr, others' boxes": null.mean, "p": null.p, "p, adjusted": null.adjusted}
    heads = head_table(
        {
            "ocr": ocr.mean,
            **by_position,
            "retrieval": retrieval.mean,
            "ocr_head": chosen["ocr"],
            "retrieval_head": chosen["retrieval"],
        }
    ).sort_values(["ocr", "retrieval"], ascending=False, ignore_index=True)
    lines = []
    for kind, where in chosen.items():
        found = [(int(a), int(b)) for a, b in np.argwhere(where)]
        name = "OCR" if kind == "ocr" else kind
        lines.append(f"{name} heads: {len(found)} of {where.size}: {head_names(found) or 'none'}")
    lines.append(f"both kinds: {head_names([(int(a), int(b)) for a, b in np.argwhere(both)]) or 'none'}")
    width = max(34, similarity["measure"].str.len().max())
    title = f"OCR against retrieval ({len(heads)} heads)"
    lines += ["", f"  {title:{width}s} value   95% interval     chance  same heads  p more   p less   p different"]
    for row in similarity.dropna(subset="value").to_dict("records"):
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        tests = "  ".join(f"{row[name]:.4f} " for name in ("p more", "p less", "p different"))
        lines.append(
            f"  {row['measure']:{width}s} {row['value']:6.3f}  {interval:15s}  {row['chance']:6.3f}  "
            f"{row['same heads']:10.3f}  {tests}".replace("nan", "  –")
        )
    lines += ["", f"  {'frequency against mean':32s} Pearson 95% interval"]
    for row in each_row(activation.dropna(subset="pearson")):
        name = f"{row.heads}, by {row.granularity}"
        lines.append(f"  {name:32s} {row.pearson:6.3f}  {row.low:.3f} to {row.high:.3f}")
    figures = {
        "sparsity": (plots.shares(sparsity), "Share of heads per score range of the paper"),
        "ocr-against-retrieval": (
            plots.scatter(ocr.mean, retrieval.mean, config.threshold),
            f"Both scores of every head, {len(ocr.instances)} and {len(retrieval.instances)} {ocr.granularity}s",
        ),
        "activation": (
            plots.activation({"OCR": ocr, "retrieval": retrieval}, config.threshold),
            "Heads by activation frequency (line) with mean scores (bars), at the same granularity",
        ),
    }
    tables = {
        "heads": (
            heads,
            "OCR and retrieval score of every head. others' boxes: OCR score on the boxes of other samples, what a "
            f"head's habits of position give; p: one-sided, {config.permutations:,} random pairings of samples; "
            "adjusted for all heads (Benjamini-Hochberg)",
            30,
        ),
        "sparsity": (sparsity, "Heads per score range, here and published", None),
        "similarity": (similarity, _similarity_caption(config), None),
        "activation": (activation, "Correlation of activation frequency and mean score over heads", None),
    }
    about = [
        "Chance: one kind's values are permuted over the heads of each layer, because both kinds may live in the same "
        "layers. Same heads: what two halves of one kind's samples share, the most that noise allows; compare it with "
        "halves, the same for the two kinds. p different tests the paper's claim: kinds are exchanged between samples "
        "at random.",
    ]
    return Finding(
        "Selection, sparsity, difference, activation",
        lines,
        about,
        figures,
        tables,
        [*_null_answer(chosen["ocr"], null), _similarity_answer(similarity.to_dict("records")[0])],
    )


# ---------------------------------------------------------------- less sparse


def sparsity_table(study: Study) -> pd.DataFrame:
    """Number and share of heads per score range of the paper.

    All heads of the model are counted, so the only doubt is the noise of each score: `surely` counts heads whose 95%
    interval lies in the range, `possibly` those whose interval touches it.
    """
    sets = {"OCR": study.ocr, "retrieval": study.retrieval}
    if study.sibling is not None:
        sets["retrieval, text model"] = study.sibling
    rows = []
    for name, scores in sets.items():
        low, high = (range_of(end) for end in scores.interval)
        for i, (interval, n) in enumerate(per_range(scores.mean).items()):
            surely, possibly = ((low == i) & (high == i)).sum(), ((low <= i) & (i <= high)).sum()
            rows.append((f"{name}, here", interval, n, n / scores.mean.size, surely, possibly, len(scores.instances)))
    for name, record in published_models().items():
        for kind in ("ocr", "retrieval_text_model"):
            for interval, percent in zip(RANGES, record["percent_per_range"][kind], strict=True):
                label = f"{'OCR' if kind == 'ocr' else 'retrieval, text model'}, published, {name.split('/')[1]}"
                rows.append((label, interval, np.nan, percent / 100, np.nan, np.nan, 0))
    return pd.DataFrame(rows, columns=["heads", "score range", "n", "share", "surely", "possibly", "instances"])


# ---------------------------------------------------------------- qualitatively distinct


def similarity_table(study: Study, config: SelectConfig) -> pd.DataFrame:
    """Similarity of OCR and retrieval scores (`compare_scores`), by sample; heads of two sizes are not compared."""
    pairs = {"": (study.ocr, study.retrieval)}
    if study.sibling is not None and study.sibling.mean.shape == study.ocr.mean.shape:
        pairs[" (text model)"] = (study.ocr, study.sibling)
    compared = measures(config.threshold)
    compared += [
        Measure(f"Jaccard, selected ({rule})", jaccard, partial(_selected, study=study, rule=rule)) for rule in RULES
    ]
    tables = []
    for label, (a, b) in pairs.items():
        table = compare_scores(compared, a.samples, b.samples, config.seed, config.permutations)
        tables.append(table.assign(measure=table["measure"] + label, heads=a.mean.size))
    return pd.concat(tables, ignore_index=True)


def _selected(
    samples: Float[np.ndarray, "sample layer head"], study: Study, rule: Literal["active", "inverted"]
) -> Bool[np.ndarray, "layer head"]:
    own = Scores("ocr", samples, samples, study.ocr.output_norm, len(samples), len(samples))
    return select(own, study.config.threshold, study.config.min_frequency, rule)


def _null_answer(chosen: Bool[np.ndarray, "layer head"], null: PositionNull | None) -> list[str]:
    """Sentence to quote: OCR heads against what position alone gives."""
    if null is None or not chosen.any():
        return []
    found = int((chosen & (null.adjusted <= 0.05)).sum())
    return [
        f"{found} of {int(chosen.sum())} OCR heads look at the box more often than at the boxes of other samples "
        f"(which gives them {null.mean[chosen].mean():.3f} on average); p <= 0.05, adjusted for all {chosen.size} "
        "heads."
    ]


def _similarity_answer(row: Mapping[str, Any]) -> str:
    """Sentence to quote: a measure, against chance and against the same heads."""
    if np.isnan(row["value"]):
        return f"OCR and retrieval heads cannot be compared: {row['measure']} is undefined (no head scores)."
    return (
        f"OCR against retrieval heads: {row['measure']}, {row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f}). "
        f"Heads drawn at random within layers give {row['chance']:.2f} (p = {row['p more']:.4f} for more similar), the "
        f"same heads in other samples {row['same heads']:.2f} (p = {row['p different']:.4f} for different)."
    )


# ---------------------------------------------------------------- statically activated


def activation_table(study: Study) -> pd.DataFrame:
    """Pearson correlation of activation frequency and mean score over the heads that score above 0; 95% intervals over
    samples."""
    rows = []
    for name, scores in (("OCR", study.ocr), ("retrieval", study.retrieval)):
        for granularity in GRANULARITIES:
            own = replace(scores, granularity=granularity)
            mean, frequency = own.mean.ravel(), own.frequency(study.config.threshold).ravel()
            live = mean > 0
            pearson = partial(_frequency_pearson, study.config.threshold, own)
            found = half_sampling(pearson, np.unique(own.instance_samples), seed=study.config.seed)
            values = (found.value, found.low, found.high)
            gap = float((frequency - mean)[live].mean()) if live.any() else np.nan
            rows.append((name, granularity, *values, gap, int(live.sum()), len(own.instances)))
    return pd.DataFrame(
        rows, columns=["heads", "granularity", "pearson", "low", "high", "frequency - mean", "n heads", "instances"]
    )


def _frequency_pearson(threshold: float, scores: Scores, samples: Int[np.ndarray, "sample"]) -> float:
    """Pearson correlation over heads that score above 0, in some samples."""
    instances = scores.instances[np.isin(scores.instance_samples, samples)]
    mean, frequency = instances.mean(0), (instances > threshold).mean(0)
    live = mean > 0
    if live.sum() < 2 or not np.ptp(mean[live]) or not np.ptp(frequency[live]):
        return np.nan
    return float(np.corrcoef(mean[live], frequency[live])[0, 1])


def _similarity_caption(config: SelectConfig) -> str:
    return (
        "OCR against retrieval scores; interval over samples. chance: one kind's values permuted over the heads of "
        "each layer, with one-sided p of more and of less similar than that. halves: in random halves of the samples; "
        "same heads: one kind against itself in its other half. p different: one-sided, kinds exchanged between "
        f"samples. {config.permutations:,} permutations"
    )
