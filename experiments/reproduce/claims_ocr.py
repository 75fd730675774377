"""Claims of the OCR-heads paper (arXiv 2505.15865) about heads, and their rules."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from hooked_vlm.analysis.multiple_testing import holm
from hooked_vlm.experiments.common.claims import (
    ALPHA,
    FEWEST,
    FEWEST_HEADS,
    Claim,
    Evidence,
    Judgement,
    Number,
    above,
    all_of,
    below,
    cannot_say,
    decide,
    measured,
)
from hooked_vlm.experiments.ocr_heads.published import RANGES, published_models
from hooked_vlm.experiments.reproduce.claims_tasks import EFFECTS

THRESHOLD, FREQUENCY = 0.1, 0.1
"""The paper's rule: a head scores above the one in at least the other's share of the instances."""
MOST_HEADS = 0.25
"""Share of heads that is not sparse any more."""
NULL = "p, adjusted"
"""Column of the study's table of heads: p against other samples' boxes, over all heads."""
STATIC = 0.929
"""Correlation of frequency and mean that a static kind of head exceeds: that of Qwen2-VL-2B's retrieval heads, which
the paper calls not static (computed from the published scores)."""
AGREES = 0.8
"""Jaccard index above which two lists are the same list but for noise."""
PUBLISHED_JACCARD = "Jaccard of OCR and retrieval heads 0.20, 0.28, 0.03 (computed from the published lists)"


def heads_above(scores: pd.DataFrame, name: str) -> Number:
    """Share of heads above the threshold; the interval has at its ends those that are surely and possibly above.

    All heads of a model are counted, so the doubt is the noise of each head's score: surely above are heads whose
    interval is, possibly above those whose interval is in part.
    """
    n = len(scores)
    ends = (int((scores[end] > THRESHOLD).to_numpy().sum()) / n for end in ("score", "low", "high"))
    return measured(name, ends, scores["n"].iloc[0], unit="%")


def _published_shares(kind: str) -> dict[str, float]:
    """Share of heads above the threshold, by published model."""
    return {name: sum(own["percent_per_range"][kind][2:]) / 100 for name, own in published_models().items()}


def _of_published(kind: str) -> str:
    return ", ".join(f"{share:.1%}" for share in _published_shares(kind).values())


def exist(evidence: Evidence) -> Judgement:
    """Some head scores above 0.1 in more than 10% of the instances, and more than by its position on pages."""
    scores = evidence.table("ocr-scores")
    counts = (scores["frequency"] * scores["n"]).round().astype(int)
    tests = zip(counts, scores["n"], strict=True)
    p = np.array([stats.binomtest(int(k), int(n), FREQUENCY, alternative="greater").pvalue for k, n in tests])
    adjusted = holm(p)
    heads = evidence.table("heads")
    by_position = np.zeros(len(scores))  # no null where scores have no boxes of other samples
    if NULL in heads:
        by_position = scores.merge(heads[["layer", "head", NULL]], on=["layer", "head"], how="left")[NULL].to_numpy()
    certain = scores.loc[(adjusted <= ALPHA) & (by_position <= ALPHA) & (scores["low"] > THRESHOLD)]
    top = scores.iloc[0]
    counted = f"{len(certain)} of {len(scores)} heads are certain"
    name = f"score of the top head ({top['layer']:.0f}.{top['head']:.0f}; {counted})"
    number = measured(name, (top["score"], top["low"], top["high"]), top["n"], adjusted[0])
    published = f"{_of_published('ocr')} of the heads of the paper's models score above 0.1"
    return decide(number, len(certain) > 0, bool((scores["high"] < THRESHOLD).all()), published)


def sparse(evidence: Evidence) -> Judgement:
    """The share of heads above 0.1 is small."""
    scores, published = evidence.table("ocr-scores"), _of_published("ocr")
    number = heads_above(scores, "share of heads with an OCR score above 0.1")
    if len(scores) < FEWEST_HEADS:
        return cannot_say(_few(scores), number, published)
    return below(number, MOST_HEADS, published)


def less_sparse(evidence: Evidence) -> Judgement:
    """More heads score above 0.1 as OCR heads than as retrieval heads (of the text-only sibling if it was scored)."""
    ocr, own = evidence.table("ocr-scores"), evidence.table("retrieval-scores")
    sibling = evidence.table("retrieval-in-the-text-model-scores")
    theirs = sibling if len(sibling) else own
    a, b = heads_above(ocr, "OCR"), heads_above(theirs, "retrieval")
    which = "retrieval heads of the text-only model" if len(sibling) else "retrieval heads of the same model"
    ends = (a.value - b.value, a.low - b.high, a.high - b.low)
    number = measured(f"share of OCR heads minus share of {which}", ends, min(a.n, b.n), unit="points")
    published = f"OCR {_of_published('ocr')}; retrieval (text-only models) {_of_published('retrieval_text_model')}"
    if min(len(ocr), len(theirs)) < FEWEST_HEADS:
        return cannot_say(_few(ocr), number, published)
    return decide(number, number.low > 0, number.high <= 0, published)


def distinct(evidence: Evidence) -> Judgement:
    """OCR and retrieval heads are less alike than either kind is to itself in other samples."""
    table, instances = evidence.table("similarity"), evidence.table("ocr-scores")["n"]
    row = table.loc[table["measure"].str.startswith("Jaccard, score >")].iloc[0]
    name = f"Jaccard of heads above 0.1 (same heads in other samples: {row['same heads']:.2f})"
    number = measured(name, (row["value"], row["low"], row["high"]), instances.iloc[0], row["p different"])
    if np.isnan(row["value"]):
        return cannot_say("no head of either kind scores above 0.1", number, PUBLISHED_JACCARD)
    ceiling = float(row["same heads"])
    return decide(number, number.p <= ALPHA and number.high < ceiling, bool(number.low >= ceiling), PUBLISHED_JACCARD)


def static(evidence: Evidence) -> Judgement:
    """Heads' activation frequency follows their mean score, over samples."""
    table = evidence.table("activation")
    row = table.loc[(table["heads"] == "OCR") & (table["granularity"] == "sample")].iloc[0]
    ends = (row["pearson"], row["low"], row["high"])
    number = measured("Pearson of frequency and mean score", ends, row["instances"])
    published = "OCR heads of InternVL2-8B 1.000 (of single boxes, by definition); retrieval heads of Qwen2-VL-2B 0.929"
    if row["n heads"] < FEWEST:
        why = f"only {row['n heads']:.0f} heads score above 0; a correlation over heads needs {FEWEST}"
        return cannot_say(why, number, published)
    return above(number, STATIC, published)


def as_published(evidence: Evidence, kind: str) -> Judgement:
    """The list of heads is the published one."""
    if (why := _incomparable(evidence)) is not None:
        return cannot_say(why)
    table = evidence.table("published-overlap")
    own = table.loc[(table["heads"] == kind) & table["measure"].str.startswith("Jaccard")]
    row = own.iloc[0]
    number = measured(f"{row['measure']}, published and here", (row["value"], row["low"], row["high"]), row["n"])
    return above(number, AGREES, f"{PUBLISHED_LISTS} of {evidence.model}")


def ranges_as_published(evidence: Evidence) -> Judgement:
    """Shares of heads per score range are the published ones; the worst range decides."""
    if (why := _incomparable(evidence)) is not None:
        return cannot_say(why)
    assert evidence.published is not None
    table = evidence.table("sparsity")
    here = table.loc[table["heads"] == "OCR, here"].set_index("score range")
    parts = []
    for name, percent in zip(RANGES, evidence.published["percent_per_range"]["ocr"], strict=True):
        own, heads = here.loc[name], float(here["n"].sum())
        value, low, high = (float(own[column]) / heads for column in ("n", "surely", "possibly"))
        number = measured(f"share of heads in {name}", (value, low, high), own["instances"], unit="%")
        # the published shares are rounded to 0.01%
        outside = not low - 1e-4 <= percent / 100 <= high + 1e-4
        # intervals as wide as this one say nothing
        informative = high - low <= INFORMATIVE
        parts.append(decide(number, not outside and informative, outside, f"{percent:.2f}%"))
    worst = all_of(parts)
    shares = ", ".join(f"{percent:g}%" for percent in evidence.published["percent_per_range"]["ocr"])
    return Judgement(worst.verdict, worst.reason, worst.number, f"{shares} in {', '.join(RANGES)}")


INFORMATIVE = 0.1
"""Width of the interval of a share of heads up to which agreement with the published share is a pass."""
PUBLISHED_LISTS = "list decoded from the notebook's heatmaps,"


def _few(scores: pd.DataFrame) -> str:
    n = len(scores)
    return f"one of {n} heads is {1 / n:.1%} of them, and shares need {FEWEST_HEADS} heads"


def _incomparable(evidence: Evidence) -> str | None:
    """Why heads cannot be compared with published ones; None if they can."""
    if evidence.published is None:
        return f"no heads are published for {evidence.model}"
    if not evidence.compat:
        return "the published heads were measured as the official code does: run with --compat"
    return None


def _listed(kind: str, name: str) -> Claim:
    def judge(evidence: Evidence, kind: Any = kind) -> Judgement:
        return as_published(evidence, kind)

    return Claim(
        f"published list, {name}",
        f"The {name} of the model are those of the published list.",
        f"The interval of the Jaccard index of both lists, over samples, lies above {AGREES}, in a run with --compat.",
        judge,
    )


CLAIMS = (
    Claim(
        "exist",
        "Some heads read text in images: OCR heads exist.",
        f"At least one head has an interval of its score above {THRESHOLD} and scores above it in more than "
        f"{FREQUENCY:.0%} of the instances (exact binomial test, Holm over all heads, p <= {ALPHA}) and more than with "
        f"the boxes of other samples (adjusted p <= {ALPHA}).",
        exist,
    ),
    Claim(
        "sparse",
        "OCR heads are a small share of all heads.",
        f"The share of heads above {THRESHOLD}, those that are only possibly above counted, is below {MOST_HEADS:.0%}; "
        f"needs {FEWEST_HEADS} heads.",
        sparse,
    ),
    Claim(
        "shares per range",
        "The shares of heads per score range are those of the published table.",
        "In every range the published share lies between the shares of heads that are surely and possibly in it, and "
        f"these are at most {INFORMATIVE:.0%} apart, in a run with --compat.",
        ranges_as_published,
    ),
    Claim(
        "less sparse",
        "OCR heads are less sparse than retrieval heads.",
        "The share of heads that surely have an OCR score above 0.1 exceeds the share that possibly have such a "
        f"retrieval score; needs {FEWEST_HEADS} heads.",
        less_sparse,
    ),
    Claim(
        "distinct",
        "OCR heads are qualitatively distinct from retrieval heads.",
        "The interval of the Jaccard index of both kinds lies below that of the same heads in halves of the samples, "
        f"and exchanging the kinds between samples gives p <= {ALPHA} for different.",
        distinct,
    ),
    Claim(
        "static",
        "OCR heads are statically activated: their activation frequency follows their score.",
        f"The interval of the Pearson correlation of frequency and mean score, over heads and by sample, lies above "
        f"{STATIC} (single boxes score 0 or 1, so that both are equal by definition); needs {FEWEST} heads above 0.",
        static,
    ),
    *EFFECTS,
    _listed("ocr", "OCR heads"),
    _listed("retrieval", "retrieval heads"),
)
