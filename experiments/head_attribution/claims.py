"""Claims of the head-attribution paper (arXiv 2509.17588) and their rules."""

from collections import Counter

import numpy as np
import pandas as pd

from hooked_vlm.analysis.multiple_testing import holm
from hooked_vlm.analysis.statistics import Estimate
from hooked_vlm.experiments.common.claims import (
    ALPHA,
    FEWEST,
    FEWEST_LAYERS,
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
from hooked_vlm.experiments.head_attribution.agreement import NOISY, SAME, SAY
from hooked_vlm.experiments.head_attribution.findings import OverPictures
from hooked_vlm.experiments.head_attribution.rankings import RANKINGS
from hooked_vlm.experiments.head_attribution.show_curves import NEEDED_BOTH
from hooked_vlm.experiments.head_attribution.show_tokens import LOST

WEAK = 0.4
"""Rank correlation below which a relation is weak (Evans 1996: 0.20 to 0.39)."""
SPARSE = 0.25
"""Share of the image tokens that is a sparse subset."""
CHANCE = 0.5
"""AUC of tokens that have nothing to do with the object."""
BASELINES = ("single", "attention", "attention_final", "value_weighted", "gradient", "random")
"""Rankings that cost fewer runs than attribution (those of kept single heads, which are ours, apart)."""
RECEIVING = ("assistant header", "final")
"""Text that receives image information in the paper."""


def single_heads_fail(evidence: Evidence) -> Judgement:
    """At one run per head, attribution needs fewer heads than the ranking by single-head ablation."""
    number = _difference(evidence.table("curve_differences"), "attribution_1x", "single")
    if number is None:
        return cannot_say("the masks are fewer than the heads, so there is no ranking at an equal budget")
    return below(number, 0.0)


def fewer_than_baselines(evidence: Evidence) -> Judgement:
    """Attribution from all masks needs fewer heads than each baseline."""
    table = evidence.table("curve_differences")
    numbers = [own for name in BASELINES if (own := _difference(table, "attribution", name)) is not None]
    if not numbers:
        return cannot_say("the run has no curves")
    adjusted = holm(np.array([own.p for own in numbers]))
    # that all lie below 0 needs no correction; that one of them lies above does
    parts = [
        decide(own, own.high < 0, bool(own.low > 0 and p <= ALPHA)) for own, p in zip(numbers, adjusted, strict=True)
    ]
    return all_of(parts)


def _difference(table: pd.DataFrame, ranking: str, baseline: str) -> Number | None:
    """Heads that attribution needs minus those of a baseline; None if they were not compared."""
    if not len(table):
        return None
    pair = (table["ranking"] == RANKINGS[ranking]) & (table["against"] == RANKINGS[baseline])
    own = table.loc[pair & (table["measure"] == NEEDED_BOTH)]
    if not len(own):
        return None
    row = own.iloc[0]
    unit = "name" if np.isfinite(row["low, by name"]) else "picture"
    name = f"{NEEDED_BOTH}: {row['ranking']} minus {row['against']}"
    ends = (row["value"], row[f"low, by {unit}"], row[f"high, by {unit}"])
    return measured(name, ends, row[f"{unit}s"], row[f"p, by {unit}"])


def mid_to_late(evidence: Evidence) -> Judgement:
    """The mean layer of the positive coefficients lies behind the middle of the layers."""
    middle = (evidence.n_layers - 1) / 2
    number = number_of(
        f"mean layer of the coefficients (middle: {middle:g})", evidence.findings.get("mean layer of coefficients")
    )
    if evidence.n_layers < FEWEST_LAYERS:
        why = f"{evidence.n_layers} layers have no early, middle and late ones; {FEWEST_LAYERS} are needed"
        return cannot_say(why, number)
    return above(number, middle)


def attention_says_little(evidence: Evidence) -> Judgement:
    """The rank correlation of attention to the image and importance is weak."""
    found = evidence.findings.get(f"Spearman of coefficients with {RANKINGS['attention']}")
    number = number_of("Spearman of attention to the image and coefficients", found)
    inside = number.low > -WEAK and number.high < WEAK
    return decide(number, inside, number.low > WEAK or number.high < -WEAK)


def alike_by_name(evidence: Evidence) -> Judgement:
    """Coefficients are more alike between pictures of one name than between pictures of other names."""
    fits = evidence.table("fits")
    shown = Counter(fits["name"]) if len(fits) else Counter()
    repeated = sum(count > 1 for count in shown.values())
    cosine = "cosine between pictures, "
    same, other = (number_of(name, evidence.findings.get(cosine + name)) for name in ("same name", "other names"))
    number = _minus("cosine of coefficients, same name minus other names", same, other, repeated)
    if repeated < FEWEST:
        return cannot_say(f"{repeated} names have two pictures or more, {FEWEST} are needed", number)
    return decide(number, number.low > 0, number.high < 0)


def semantics(evidence: Evidence) -> Judgement:
    """The same name explains agreement on heads beyond every measure of appearance."""
    table = evidence.table("explained")
    if not len(table):
        return cannot_say("it needs three names, and pairs of pictures of one name")
    own = table.loc[table["cause"] == SAME]
    rows = own.to_dict("records")
    noisy = [str(row["appearance"]) for row in rows if row["conclusion"] == NOISY]
    parts = []
    for row in rows:
        name = f"partial correlation with the same name, controlled for {row['appearance']}"
        ends = (row["partial"], row["low, by name"], row["high, by name"])
        number = measured(name, ends, row["names"], row["adjusted p"])
        parts.append(decide(number, row["conclusion"] == SAY, number.high < 0 and number.p <= ALPHA))
    found = all_of(parts)
    if found.verdict == "cannot say" and noisy:
        return cannot_say(f"too unreliable as measures of appearance: {', '.join(noisy)}", found.number)
    return found


def text_first(evidence: Evidence) -> Judgement:
    """Assistant header and final token receive from the question in earlier layers than from the image."""
    parts, absent = [], []
    for text in RECEIVING:
        early, late = f"question → {text}", f"image → {text}"
        name = f"layers from {early} to {late}"
        number = number_of(name, evidence.findings.get(name))
        if name not in evidence.findings:  # the study pairs the edges of the assistant header alone
            of_image, of_text = (number_of(e, evidence.findings.get(f"mean layer: {e}")) for e in (late, early))
            number = _minus(name, of_image, of_text)
        if not number.n:
            absent.append(text)
        else:
            parts.append(above(number, 0.0))
    if not parts:
        return cannot_say(f"no picture has a mean layer of both edges to {' or '.join(absent)}")
    found = all_of(parts)
    note = f"; nothing is known of {', '.join(absent)}, which receives nothing from one of them" if absent else ""
    return Judgement(found.verdict, found.reason + note, found.number)


def receivers(evidence: Evidence) -> Judgement:
    """Assistant header or final token need to see the image more than any other text does."""
    groups = [name for name in evidence.findings if name.startswith(LOST)]
    lost = {name.removeprefix(LOST): number_of(name, evidence.findings[name]) for name in groups}
    theirs = [own for name, own in lost.items() if name in RECEIVING]
    others = [own for name, own in lost.items() if name not in RECEIVING]
    if not theirs or not others:
        return cannot_say("the run has no losses of these groups of text")
    most = max(theirs, key=lambda own: own.value)
    other = max(others, key=lambda own: own.high)
    least = max(own.low for own in others)
    name = f"{most.name} (of other text at most {other.show(other.high)})"
    number = measured(name, (most.value, most.low, most.high), most.n)
    return decide(number, most.low > max(0.0, other.high), max(own.high for own in theirs) < least)


def few_tokens(evidence: Evidence) -> Judgement:
    """A sparse subset of image tokens recovers 0.8 of the image's effect."""
    table = evidence.table("keep_only")
    if not len(table):
        return cannot_say("the run has no curve over image tokens")
    row = table.loc[(table["ranking"] == "token attribution") & (table["level"] == 0.8)].iloc[0]
    unit = "name" if np.isfinite(row["low, by name"]) else "picture"
    ends = (row[name] / row["of"] for name in ("value", f"low, by {unit}", f"high, by {unit}"))
    return below(measured("share of image tokens that recovers 0.8", ends, row[f"{unit}s"], unit="%"), SPARSE)


def number_of(name: str, estimate: Estimate | None) -> Number:
    """Number of an estimate: with its interval by name where there is one, else by picture; NaN without estimate."""
    if estimate is None:
        return Number(name, np.nan, np.nan, np.nan, 0)
    low, high, n = estimate.low, estimate.high, estimate.n
    if isinstance(estimate, OverPictures) and not np.isnan(estimate.low_by_name):
        low, high, n = estimate.low_by_name, estimate.high_by_name, estimate.names
    return Number(name, float(estimate.value), float(low), float(high), int(n))


def _minus(name: str, a: Number, b: Number, n: int | None = None) -> Number:
    """Difference of two numbers, with an interval between their farthest ends (wider than 95%)."""
    n = min(a.n, b.n) if n is None else n
    return Number(name, a.value - b.value, a.low - b.high, a.high - b.low, n)


def object_and_background(evidence: Evidence) -> Judgement:
    """Object tokens matter more than background tokens, and some background is among the top tokens."""
    auc = number_of("AUC of object tokens by coefficient", evidence.findings.get("object tokens: AUC"))
    top = number_of("object's share of the top tokens", evidence.findings.get("object tokens: share of the top tokens"))
    if not auc.n:
        return cannot_say("the object's place in the pictures is not known")
    return all_of([above(auc, CHANCE), decide(top, top.high < 1, top.low >= 1)])


CLAIMS = (
    Claim(
        "single heads fail",
        "Ablating single heads fails to find the heads that attribution finds.",
        "At an equal budget of one run per head, the interval of the difference in heads needed for 0.8 of "
        "faithfulness and completeness (attribution minus single-head ablation) lies below 0.",
        single_heads_fail,
    ),
    Claim(
        "fewer heads",
        "Attribution reaches high faithfulness and completeness with fewer heads than baselines.",
        "From all masks and against each of single-head ablation, attention (three kinds), attribution patching and "
        "random order, the interval of the difference in heads needed for 0.8 of both lies below 0; it differs if one "
        f"lies above 0 with Holm's p <= {ALPHA}.",
        fewer_than_baselines,
    ),
    Claim(
        "mid to late layers",
        "Important heads lie in middle to late layers.",
        "The interval of the mean layer, weighted by positive coefficients, lies behind the middle of the layers; "
        f"needs {FEWEST_LAYERS} layers.",
        mid_to_late,
    ),
    Claim(
        "attention is no guide",
        "Attention to the image is weakly related to importance.",
        f"The interval of the rank correlation over heads lies between -{WEAK} and {WEAK}.",
        attention_says_little,
    ),
    Claim(
        "alike by name",
        "Pictures of the same name need similar heads.",
        "The interval of the cosine of coefficients between pictures of one name lies above that between pictures of "
        f"other names; needs {FEWEST} names with two pictures.",
        alike_by_name,
    ),
    Claim(
        "semantics, not appearance",
        "Semantics rather than appearance governs which heads matter.",
        "Controlled for every measure of appearance in turn, pictures of the same name agree more than others (partial "
        f"correlation above 0, Holm's p <= {ALPHA}); nothing is said if a measure is too unreliable.",
        semantics,
    ),
    Claim(
        "text first, image later",
        "Role tokens and the final token receive information from the text first and from the image later.",
        "For the assistant header and the final token, as far as they receive from both, the interval of the layers "
        "from the question's information to the image's lies above 0.",
        text_first,
    ),
    Claim(
        "role and final tokens receive",
        "Image information goes to role tokens and the final token.",
        "The share of the image's effect that is lost if the assistant header or the final token does not see the "
        "image has an interval above those of all other text.",
        receivers,
    ),
    Claim(
        "sparse image tokens",
        "A sparse subset of the image tokens carries the information.",
        f"The interval of the share of tokens that recovers 0.8 of the image's effect lies below {SPARSE:.0%}.",
        few_tokens,
    ),
    Claim(
        "object and background",
        "Important image tokens are object tokens and some background.",
        f"The interval of the AUC of object tokens lies above {CHANCE}, that of their share of the top tokens below 1.",
        object_and_background,
    ),
)
