"""Experiment: sparsity of OCR heads, difference from retrieval heads, activation frequency.

The paper's three findings (papers 1.7 to 1.9): OCR heads are less sparse, qualitatively distinct, and statically
activated. Both kinds of head are measured at the same granularity; otherwise the third holds by definition, because
scores of single tokens are 0 or 1, so that a head's frequency equals its mean.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool
from scipy import stats
from scipy.spatial.distance import jensenshannon

from hooked_vlm.analysis.statistics import bootstrap
from hooked_vlm.experiments.common.frames import each_row
from hooked_vlm.experiments.ocr_heads import plots
from hooked_vlm.experiments.ocr_heads.config import Granularity, SelectConfig
from hooked_vlm.experiments.ocr_heads.published import RANGES, per_range, published_models
from hooked_vlm.experiments.ocr_heads.scoring import Scores
from hooked_vlm.experiments.ocr_heads.selection import select
from hooked_vlm.experiments.ocr_heads.similarity import jaccard, spearman
from hooked_vlm.experiments.ocr_heads.study import Finding, Study, head_names, head_table

RESAMPLES = 500
"""Bootstrap resamples of heads or instances."""
GRANULARITIES: tuple[Granularity, ...] = ("sample", "token")
RULES: tuple[Literal["active", "inverted"], ...] = ("active", "inverted")


def profile(study: Study, config: SelectConfig) -> Finding:
    """Compare OCR and retrieval heads: selection, sparsity, similarity, activation."""
    ocr, retrieval = study.ocr, study.retrieval
    chosen = {"ocr": study.selected(ocr), "retrieval": study.selected(retrieval)}
    both = chosen["ocr"] & chosen["retrieval"]
    sparsity, similarity = sparsity_table(study), similarity_table(study, config)
    activation = activation_table(study)
    heads = head_table(
        {
            "ocr": ocr.mean,
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
    width = max(42, similarity["measure"].str.len().max())
    title = f"OCR against retrieval scores ({len(heads)} heads)"
    lines += ["", f"  {title:{width}s} value   95% interval     chance  p"]
    for row in each_row(similarity):
        interval = f"{row.low:.3f} to {row.high:.3f}"
        lines.append(f"  {row.measure:{width}s} {row.value:6.3f}  {interval:15s}  {row.chance:6.3f}  {row.p:.4f}")
    lines += ["", f"  {'frequency against mean':32s} Pearson 95% interval"]
    for row in each_row(activation):
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
        "heads": (heads, "OCR and retrieval score of every head", 30),
        "sparsity": (sparsity, "Heads per score range, here and published", None),
        "similarity": (similarity, _similarity_caption(config), None),
        "activation": (activation, "Correlation of activation frequency and mean score over heads", None),
    }
    about = [
        "Chance is the mean over random permutations: one kind's scores are permuted over heads or, for the "
        "Wasserstein distance, which ignores head identity, the two scores of each head are swapped at random. p is "
        "one-sided: the share of permutations that are at least as similar (for distances: at least as different). "
        "Intervals resample heads.",
    ]
    return Finding("Selection, sparsity, difference, activation", lines, about, figures, tables)


# ---------------------------------------------------------------- less sparse


def sparsity_table(study: Study) -> pd.DataFrame:
    """Number and share of heads per score range of the paper; intervals of shares resample instances."""
    sets = {"OCR": study.ocr, "retrieval": study.retrieval}
    if study.sibling is not None:
        sets["retrieval, text model"] = study.sibling
    rows = []
    for name, scores in sets.items():
        counts = per_range(scores.mean)
        rng = np.random.default_rng([study.config.seed, 14])
        n_instances = len(scores.instances)
        draws = [scores.instances[rng.integers(n_instances, size=n_instances)].mean(0) for _ in range(RESAMPLES)]
        in_ranges = np.array([list(per_range(mean).values()) for mean in draws]) / scores.mean.size
        low, high = np.percentile(in_ranges, [2.5, 97.5], axis=0)
        for i, (interval, n) in enumerate(counts.items()):
            rows.append((f"{name}, here", interval, n, n / scores.mean.size, low[i], high[i], n_instances))
    for name, record in published_models().items():
        for kind in ("ocr", "retrieval_text_model"):
            for interval, percent in zip(RANGES, record["percent_per_range"][kind], strict=True):
                label = f"{'OCR' if kind == 'ocr' else 'retrieval, text model'}, published, {name.split('/')[1]}"
                rows.append((label, interval, np.nan, percent / 100, np.nan, np.nan, 0))
    return pd.DataFrame(rows, columns=["heads", "score range", "n", "share", "low", "high", "instances"])


# ---------------------------------------------------------------- qualitatively distinct


def similarity_table(study: Study, config: SelectConfig) -> pd.DataFrame:
    """Jaccard index, rank correlation and distribution distances of OCR and retrieval heads, against chance."""
    pairs = {"": (study.ocr, study.retrieval)}
    if study.sibling is not None and study.sibling.mean.shape == study.ocr.mean.shape:
        pairs[" (text model)"] = (study.ocr, study.sibling)
    rows = []
    for label, (a, b) in pairs.items():
        means = (a.mean.ravel(), b.mean.ravel())
        compared = [(name, measure, by_head, means) for name, measure, by_head in measures(config.threshold)]
        compared += [(f"Jaccard, selected ({rule})", jaccard, True, _selected(study, a, b, rule)) for rule in RULES]
        for name, measure, by_head, (x, y) in compared:
            found = bootstrap(measure, x, y, seed=config.seed, draws=RESAMPLES)
            chance, p = against_chance(measure, x, y, by_head, config.seed, config.permutations)
            rows.append((name + label, found.value, found.low, found.high, chance, p, len(x)))
    return pd.DataFrame(rows, columns=["measure", "value", "low", "high", "chance", "p", "n heads"])


Measure = Callable[[np.ndarray, np.ndarray], float]


def measures(threshold: float) -> list[tuple[str, Measure, bool]]:
    """List (name, function of the heads' two scores, whether it depends on head identity)."""

    def shannon(a: np.ndarray, b: np.ndarray) -> float:
        if not a.sum() or not b.sum():
            return np.nan
        with np.errstate(invalid="ignore"):  # equal distributions: rounding may leave a root of less than zero
            return float(np.nan_to_num(jensenshannon(a, b, base=2)))

    return [
        (f"Jaccard, score > {threshold:g}", lambda a, b: jaccard(a > threshold, b > threshold), True),
        ("Spearman", spearman, True),
        ("Jensen-Shannon distance", shannon, True),
        ("Wasserstein distance of scores", lambda a, b: float(stats.wasserstein_distance(a, b)), False),
    ]


def against_chance(
    measure: Measure, a: np.ndarray, b: np.ndarray, by_head: bool, seed: int, draws: int
) -> tuple[float, float]:
    """Permutation mean and p of a measure.

    With `by_head`, one kind's scores are permuted over heads; otherwise the two scores of each head are swapped at
    random. p is the share of permutations with at least the observed similarity (or distance).

    Returns:
        (mean, p); NaN where the measure is undefined.
    """
    rng = np.random.default_rng([seed, 15])
    observed, found = measure(a, b), []
    for _ in range(draws):
        if by_head:
            found.append(measure(a, rng.permutation(b)))
        else:
            swap = rng.random(len(a)) < 0.5
            found.append(measure(np.where(swap, b, a), np.where(swap, a, b)))
    values = np.array(found)
    values = values[~np.isnan(values)]
    if np.isnan(observed) or not len(values):
        return np.nan, np.nan
    return float(values.mean()), float(((values >= observed - 1e-12).sum() + 1) / (len(values) + 1))


def _selected(
    study: Study, a: Scores, b: Scores, rule: Literal["active", "inverted"]
) -> tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    threshold, often = study.config.threshold, study.config.min_frequency
    return select(a, threshold, often, rule).ravel(), select(b, threshold, often, rule).ravel()


# ---------------------------------------------------------------- statically activated


def activation_table(study: Study) -> pd.DataFrame:
    """Pearson correlation of activation frequency and mean score over the heads that score above 0."""
    rows = []
    for name, scores in (("OCR", study.ocr), ("retrieval", study.retrieval)):
        for granularity in GRANULARITIES:
            own = replace(scores, granularity=granularity)
            mean, frequency = own.mean.ravel(), own.frequency(study.config.threshold).ravel()
            live = mean > 0
            values = (np.nan,) * 3
            if live.any():
                found = bootstrap(_pearson, mean[live], frequency[live], seed=study.config.seed, draws=RESAMPLES)
                values = (found.value, found.low, found.high)
            gap = float((frequency - mean)[live].mean()) if live.any() else np.nan
            rows.append((name, granularity, *values, gap, int(live.sum()), len(own.instances)))
    return pd.DataFrame(
        rows, columns=["heads", "granularity", "pearson", "low", "high", "frequency - mean", "n heads", "instances"]
    )


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and np.ptp(a) and np.ptp(b) else np.nan


def _similarity_caption(config: SelectConfig) -> str:
    return f"OCR against retrieval scores over all heads; chance from {config.permutations:,} permutations"
