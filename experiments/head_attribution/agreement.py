"""Agreement between pictures on the important heads, by name and by appearance (arXiv 2509.17588, section 4)."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import stats

from hooked_vlm.analysis.statistics import DRAWS, Estimate, permutation_p
from hooked_vlm.experiments.head_attribution.tasks import Case
from hooked_vlm.model.vlm import HookedVLM

Square = Float[np.ndarray, "image image"]
Vectors = Float[np.ndarray, "image d"]


def cosine(vectors: Vectors) -> Square:
    """Cosine similarity between rows; 0 with a row of zeros."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
    return unit @ unit.T


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
    similarity: Square, pairs: Bool[np.ndarray, "image image"], seed: int, draws: int = DRAWS
) -> Estimate:
    """Mean over selected pairs of pictures; the interval resamples pictures (not pairs), n counts pairs."""
    n = len(similarity)
    pairs = np.triu(pairs, 1)
    if not pairs.any():
        return Estimate(np.nan, np.nan, np.nan, 0)
    counts = np.random.default_rng([seed, 13]).multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    total = ((counts @ (similarity * pairs)) * counts).sum(1)
    weight = ((counts @ pairs.astype(float)) * counts).sum(1)
    low, high = np.percentile(total[weight > 0] / weight[weight > 0], [2.5, 97.5])
    return Estimate(float(similarity[pairs].mean()), float(low), float(high), int(pairs.sum()))


def partial_correlation(
    similarity: Square, cause: Square, fixed: Sequence[Square], counts: Int[np.ndarray, "image"] | None = None
) -> float:
    """Partial correlation over pairs of the similarity with a cause, controlling for `fixed`.

    Computed from the inverse of the correlation matrix; `counts` weights pictures. NaN where a column is constant or
    follows from the others.
    """
    n = len(similarity)
    i, j = np.triu_indices(n, 1)
    weights = np.ones(len(i)) if counts is None else (counts[i] * counts[j]).astype(float)
    columns = np.stack([square[i, j] for square in (similarity, cause, *fixed)])
    if (weights > 0).sum() < len(columns) + 2:
        return np.nan
    covariance = np.cov(columns, aweights=weights, bias=True)
    scale = np.sqrt(np.diag(covariance))
    if (scale < 1e-9).any():
        return np.nan
    correlation = covariance / np.outer(scale, scale)
    if np.linalg.cond(correlation) > 1e8:
        return np.nan
    precision = np.linalg.inv(correlation)
    return float(-precision[0, 1] / np.sqrt(precision[0, 0] * precision[1, 1]))


SAME, NAMES, PICTURES = "same name", "name similarity", "picture similarity"
QUESTIONS = ((SAME, (PICTURES,)), (NAMES, (PICTURES,)), (NAMES, (SAME, PICTURES)), (PICTURES, (SAME, NAMES)))
"""Each cause and its controls: semantics beyond appearance, appearance beyond semantics."""


def explained(similarity: Square, causes: Mapping[str, Square], seed: int, draws: int = DRAWS) -> pd.DataFrame:
    """Correlation of the similarity with each cause of `QUESTIONS`, alone and with controls, one row each.

    Intervals resample pictures; p is one-sided and permutes the coefficient vectors between pictures (Mantel's test
    with the partial correlation as its statistic).
    """
    n = len(similarity)
    rng = np.random.default_rng([seed, 14])
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(draws, 500))
    rows = []
    for name, controls in QUESTIONS:
        cause, fixed = causes[name], [causes[other] for other in controls]
        partial = partial_correlation(similarity, cause, fixed)
        low = high = p = np.nan
        if not np.isnan(partial):
            resampled = [partial_correlation(similarity, cause, fixed, counts) for counts in drawn]
            low, high = np.nanpercentile(resampled, [2.5, 97.5])
            p = permutation_p(
                lambda shuffled, cause=cause, fixed=fixed: partial_correlation(shuffled, cause, fixed),
                lambda rng: _exchanged(similarity, rng.permutation(n)),
                partial,
                seed,
                draws,
            )
        alone = partial_correlation(similarity, cause, [])
        rows.append((name, ", ".join(controls), alone, partial, low, high, p, n * (n - 1) // 2, n))
    columns = ["cause", "controlled for", "correlation", "partial", "low", "high", "p", "pairs", "images"]
    return pd.DataFrame(rows, columns=columns)


def _exchanged(similarity: Square, order: Int[np.ndarray, "image"]) -> Square:
    return similarity[np.ix_(order, order)]


def causes_of(cases: Sequence[Case], model: HookedVLM) -> dict[str, Square]:
    """Possible causes for two pictures needing the same heads: same name, name similarity, picture similarity.

    Names are compared by the mean embedding of their tokens, pictures by the mean of their image features; both are
    centred first, which removes what all have in common.
    """
    names = np.array([case.item.name for case in cases])
    features = [case.inputs.image_features for case in cases]
    pictures = np.stack([f.float().mean(0).cpu().numpy() for f in features if f is not None]).astype(float)
    words = {name: model.W_E[model.to_tokens(name)[0]].float().mean(0).detach().cpu().numpy() for name in set(names)}
    texts = np.stack([words[name] for name in names]).astype(float)
    return {
        SAME: (names[:, None] == names[None]).astype(float),
        NAMES: cosine(texts - texts.mean(0)),
        PICTURES: cosine(pictures - pictures.mean(0)),
    }
