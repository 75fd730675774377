"""Agreement between pictures on the important heads, by name and by appearance (arXiv 2509.17588, section 4)."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped
from scipy import stats

from hooked_vlm.analysis.intervals import jackknife_interval
from hooked_vlm.analysis.multiple_testing import holm
from hooked_vlm.experiments.common.words import listed
from hooked_vlm.experiments.head_attribution.appearance import (
    Looks,
    Square,
    Vectors,
    centred_cosine,
    corrected_partial,
    cosine,
)
from hooked_vlm.experiments.head_attribution.findings import OverPictures
from hooked_vlm.experiments.head_attribution.tasks import Case
from hooked_vlm.model.vlm import HookedVLM


def spearman(vectors: Vectors) -> Square:
    """Rank correlation between rows."""
    ranks = stats.rankdata(vectors, axis=1)
    return cosine(ranks - ranks.mean(1, keepdims=True))


def jaccard(vectors: Vectors, top: int) -> Square:
    """Jaccard index of the `top` largest entries between rows."""
    largest = np.zeros(vectors.shape)
    np.put_along_axis(largest, np.argsort(-vectors, axis=1, kind="stable")[:, :top], 1.0, axis=1)
    shared = largest @ largest.T
    return shared / (2 * top - shared)


def similarities(vectors: Vectors, top: int) -> dict[str, Square]:
    """Similarity matrices of the coefficient vectors, by measure."""
    found = {"cosine": cosine(vectors), "Spearman": spearman(vectors)}
    return found | {f"top-{top} Jaccard": jaccard(vectors, top)}


def mean_of_pairs(
    similarity: Square, pairs: Bool[np.ndarray, "image image"], names: Shaped[np.ndarray, "image"]
) -> OverPictures:
    """Mean over selected pairs of pictures; intervals leave out pictures or names (jackknife), n counts pictures."""
    pairs = np.triu(pairs, 1)
    if not pairs.any():
        return OverPictures(np.nan, np.nan, np.nan, 0, np.nan, np.nan, 0)

    def mean(used: Bool[np.ndarray, "image"]) -> float:
        own = pairs & used[:, None] & used
        return float(similarity[own].mean()) if own.any() else np.nan

    low, high, _ = jackknife_interval(mean, np.arange(len(names)))
    named = jackknife_interval(mean, names)[:2]
    return OverPictures(float(similarity[pairs].mean()), low, high, len(names), *named, len(np.unique(names)))


SAME, NAMES = "same name", "name similarity"
RELIABLE = 0.5
"""Reliability below which a measure of appearance allows no conclusion."""
SAY, SILENT, NOISY = "more similar", "no evidence", "cannot say"


def explained(
    similarity: Square, causes: Mapping[str, Square], looks: Mapping[str, Looks], names: Shaped[np.ndarray, "image"]
) -> pd.DataFrame:
    """Whether pictures with the same (or a similar) name need similar heads beyond looking alike, by each measure.

    One row for each cause and measure: the measure's reliability, correlations over pairs, the partial correlation of
    similarity and cause controlled for appearance (`corrected_partial`) with its 95% interval and p, which leave out
    one name at a time, Holm's p over the family of all rows, and what can be said: "more similar", "no evidence", or
    "cannot say" where the reliability is below `RELIABLE` or the partial correlation is undefined.
    """
    i, j = np.triu_indices(len(similarity), 1)
    rows = []
    for cause, square in causes.items():
        for measure, own in looks.items():
            partial, reliability = corrected_partial(similarity, square, own, np.ones(len(names), bool))

            def without(used: Bool[np.ndarray, "image"], square: Square = square, own: Looks = own) -> float:
                return corrected_partial(similarity, square, own, used)[0]

            low, high, p = jackknife_interval(without, names, bounded=True)
            if not reliability >= RELIABLE:
                partial = low = high = p = np.nan
            alone = [_correlation(a[i, j], b[i, j]) for a, b in _pairs_of(similarity, square, own)]
            rows.append((cause, measure, reliability, *alone, partial, low, high, p))
    table = pd.DataFrame(rows, columns=EXPLAINED)
    table["adjusted p"] = holm(table["p"].to_numpy(dtype=float))
    positive = (table["adjusted p"] <= 0.05) & (table["partial"] > 0)
    table["conclusion"] = np.where(table["p"].isna(), NOISY, np.where(positive, SAY, SILENT))
    return table.assign(pictures=len(names), names=len(np.unique(names)))


EXPLAINED = [
    "cause", "appearance", "reliability", "similarity with cause", "similarity with appearance",
    "cause with appearance", "partial", "low, by name", "high, by name", "p",
]  # fmt: skip


def _pairs_of(similarity: Square, cause: Square, looks: Looks) -> list[tuple[Square, Square]]:
    return [(similarity, cause), (similarity, looks.first), (cause, looks.first)]


def _correlation(a: Float[np.ndarray, "pair"], b: Float[np.ndarray, "pair"]) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) and a.std() > 1e-9 and b.std() > 1e-9 else np.nan


def conclusion(table: pd.DataFrame) -> str:
    """What can be said of the same name beyond appearance, from the table of `explained`."""
    own = table.loc[table["cause"] == SAME]
    by = {said: own.loc[own["conclusion"] == said, "appearance"].tolist() for said in (SAY, SILENT, NOISY)}
    if not by[SAY] and not by[SILENT]:
        return (
            "Whether pictures of one name agree on heads beyond looking alike cannot be said: no measure of "
            "appearance allows it."
        )
    parts = []
    if by[SAY]:
        parts.append(f"agree on heads more than their appearance explains, measured by {listed(by[SAY])}")
    if by[SILENT]:
        parts.append(f"show no evidence of that, measured by {listed(by[SILENT])}")
    if by[NOISY]:
        parts.append(f"cannot be judged by {listed(by[NOISY])}")
    said = f"Pictures of one name {'; they '.join(parts)}."
    if by[SILENT] or by[NOISY]:
        return f"{said} So appearance is not ruled out."
    return f"{said} Aspects of appearance that none of these measures are not ruled out."


def causes_of(cases: Sequence[Case], model: HookedVLM) -> dict[str, Square]:
    """Semantic causes for two pictures needing the same heads: same name, name similarity.

    Names are compared by the mean embedding of their tokens, centred, which removes what all have in common. Causes
    that are the same for all pairs are left out.
    """
    names = np.array([case.item.name for case in cases])
    words = {name: model.W_E[model.to_tokens(name)[0]].float().mean(0).detach().cpu().numpy() for name in set(names)}
    texts = np.stack([words[name] for name in names]).astype(float)
    squares = {SAME: (names[:, None] == names[None]).astype(float), NAMES: centred_cosine(texts)}
    upper = np.triu_indices(len(names), 1)
    return {name: own for name, own in squares.items() if len(upper[0]) and own[upper].std() > 1e-9}
