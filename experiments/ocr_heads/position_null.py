"""What a head would score without reading: the boxes of other samples.

A head that always looks at the same places of a page hits some boxes by position alone. The positions it looks at in
one sample are compared with the boxes of another (the i-th token with the i-th box, both counted from where the page
begins), over random pairings of samples; so its habits and the places of boxes stay what they are, and only their
connection is lost.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_vlm.analysis.multiple_testing import benjamini_hochberg
from hooked_vlm.experiments.ocr_heads.scoring import Looked, Scores


@dataclass(frozen=True, eq=False)
class PositionNull:
    """Hits on other samples' boxes, and the test that own boxes are hit more often."""

    mean: Float[np.ndarray, "layer head"]
    """Mean share of tokens on another sample's box."""
    p: Float[np.ndarray, "layer head"]
    """One-sided: the share of random pairings in which a head hits at least as often."""
    adjusted: Float[np.ndarray, "layer head"]
    """p adjusted for all heads (Benjamini-Hochberg)."""


def null_of_positions(scores: Scores, seed: int, draws: int) -> PositionNull | None:
    """Test every head's hits against those on other samples' boxes; None if fewer than three samples have tokens."""
    samples = [own for own in scores.looked if len(own.evidence)]
    if len(samples) < 3:
        return None
    shape = scores.mean.shape
    boxes = _boxes(samples)
    looked = _padded(samples, boxes.shape[2] - 1)
    rng, n = np.random.default_rng([seed, 19]), len(samples)
    pairings = np.array([rng.permutation(n) for _ in range(draws)])
    mean, p = np.empty(shape), np.empty(shape)
    for at in np.ndindex(shape):
        hits = _hits(looked[:, :, at[0], at[1]], boxes, [len(own.evidence) for own in samples])
        own = hits.diagonal().sum()
        mean[at] = (hits.sum() - own) / (n * (n - 1))
        as_many = (hits[np.arange(n), pairings].sum(1) >= own - 1e-9).sum() if own else draws
        p[at] = (as_many + 1) / (draws + 1)
    return PositionNull(mean, p, benjamini_hochberg(p.ravel()).reshape(shape))


def _boxes(samples: list[Looked]) -> Bool[np.ndarray, "sample token place"]:
    """Which places each sample's tokens may be copied from. A sample's last token stands for those it has not; the last
    place is nowhere."""
    width = max(len(own.evidence) for own in samples)
    places = 1 + max((int(e.max()) for own in samples for e in own.evidence if len(e)), default=0)
    boxes = np.zeros((len(samples), width, places + 1), dtype=bool)
    for i, own in enumerate(samples):
        for t in range(width):
            boxes[i, t, own.evidence[min(t, len(own.evidence) - 1)]] = True
    return boxes


def _padded(samples: list[Looked], nowhere: int) -> Int[np.ndarray, "sample token layer head"]:
    """Places looked at; those that no box contains, and tokens that a sample has not, are `nowhere`."""
    width = max(len(own.evidence) for own in samples)
    padded = np.full((len(samples), width, *samples[0].at.shape[1:]), nowhere)
    for i, own in enumerate(samples):
        padded[i, : len(own.at)] = np.where((own.at < 0) | (own.at >= nowhere), nowhere, own.at)
    return padded


def _hits(
    looked: Int[np.ndarray, "sample token"], boxes: Bool[np.ndarray, "sample token place"], n_tokens: list[int]
) -> Float[np.ndarray, "sample sample"]:
    """Share of the tokens of each sample (row) at which its head looks into the box of each sample (column)."""
    found = np.zeros((len(looked), len(looked)))
    for t in range(looked.shape[1]):
        found += boxes[:, t, looked[:, t]].T
    return found / np.array(n_tokens)[:, None]
