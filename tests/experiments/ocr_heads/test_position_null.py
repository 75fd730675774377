"""The null of OCR scores: what position alone gives a head, and how often the test errs."""

import numpy as np
import pytest

from hooked_vlm import HookedVLM
from hooked_vlm.experiments.ocr_heads.config import Protocol
from hooked_vlm.experiments.ocr_heads.data.scored import toy_pages
from hooked_vlm.experiments.ocr_heads.position_null import null_of_positions
from hooked_vlm.experiments.ocr_heads.reading import NOWHERE
from hooked_vlm.experiments.ocr_heads.scoring import Looked, Scores, gather, score_batch


def scores_of(looked: list[Looked]) -> Scores:
    """Scores as the positions give them."""
    samples = np.array([
        np.mean([np.isin(at, e) for at, e in zip(own.at, own.evidence, strict=True)], axis=0) for own in looked
    ])  # fmt: skip
    n = len(samples)
    return Scores("ocr", samples, samples, np.ones(samples.shape[1:]), n, n, looked=looked)


def made(rng: np.random.Generator, n: int = 40, places: int = 20) -> list[Looked]:
    """Heads 0.0: reads; 0.1: looks anywhere; 0.2: always at place 3; 0.3: nowhere. Two tokens each."""
    found = []
    for _ in range(n):
        boxes = rng.integers(places, size=2)
        at = np.stack([boxes, rng.integers(places, size=2), [3, 3], [NOWHERE, NOWHERE]], axis=1)
        found.append(Looked(at[:, None], [np.array([box]) for box in boxes]))
    return found


def test_a_head_that_reads_is_told_from_heads_with_habits() -> None:
    null = null_of_positions(scores_of(made(np.random.default_rng(0))), 0, 500)
    assert null is not None
    assert null.p[0, 0] == 1 / 501 and null.adjusted[0, 0] < 0.01
    assert (null.p[0, 1:] > 0.05).all() and null.p[0, 3] == 1.0
    assert null.mean[0] == pytest.approx([0.05, 0.05, 0.05, 0.0], abs=0.02)
    assert null_of_positions(scores_of(made(np.random.default_rng(0), 2)), 0, 10) is None


def test_the_null_is_the_mean_over_pairs_by_hand() -> None:
    """Three samples, of one and two tokens; a sample's last box stands for those it has not."""
    boxes = [[[0]], [[0, 1], [2]], [[5]]]
    ats = [[0], [0, 2], [1]]
    looked = [
        Looked(np.array(at).reshape(-1, 1, 1), [np.array(b) for b in own]) for at, own in zip(ats, boxes, strict=True)
    ]
    null = null_of_positions(scores_of(looked), 0, 50)
    assert null is not None
    # looks of 0 on boxes of 1, 2: 1, 0; of 1 on 0 (box 0 twice), 2: 1/2, 0; of 2 on 0, 1: 0, 1
    assert null.mean.item() == pytest.approx((1 + 0 + 0.5 + 0 + 0 + 1) / 6)


@pytest.mark.slow
def test_the_null_errs_at_its_rate() -> None:
    rng, runs = np.random.default_rng(0), 300
    ps = []
    for seed in range(runs):
        null = null_of_positions(scores_of(made(rng, 20, 5)), seed, 199)
        assert null is not None
        ps.append(null.p[0, 1])
    assert np.mean(np.array(ps) <= 0.05) <= 0.08


def test_looks_give_the_scores_again(toy: HookedVLM) -> None:
    table = score_batch(toy, "ocr", toy_pages(0, 6), Protocol(), None, 8, exact=True)
    scores = gather("ocr", table, (toy.cfg.n_layers, toy.cfg.n_heads), "sample")
    assert len(scores.looked) == 6
    np.testing.assert_allclose(scores_of(list(scores.looked)).samples, scores.samples)
    null = null_of_positions(scores, 0, 200)
    assert null is not None
    top = np.unravel_index(scores.mean.argmax(), scores.mean.shape)
    assert null.mean[top] < scores.mean[top] / 2
    assert gather("retrieval", table.drop(columns=["looked"]), scores.mean.shape, "sample").looked == []
