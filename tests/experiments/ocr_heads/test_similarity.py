"""Similarity of two kinds of heads, characters that heads read, and how often their tests err."""

import numpy as np
import pytest
from scipy import stats

from hooked_vlm.analysis import half_sampling
from hooked_vlm.analysis.multiple_testing import group_tests
from hooked_vlm.experiments.ocr_heads.characters import specific_table, top_table
from hooked_vlm.experiments.ocr_heads.scoring import Scores
from hooked_vlm.experiments.ocr_heads.similarity import (
    against_chance,
    compare_scores,
    different_p,
    jaccard,
    measures,
    noise_ceiling,
    spearman,
)

LAYERS = np.exp(-(((np.arange(14) - 9) / 3.0) ** 2))[:, None]
"""Both kinds live in the middle layers."""


def scores_of(rng: np.random.Generator, share: float = 0.6) -> np.ndarray:
    """True scores of 14 x 12 heads: few in the middle layers."""
    return (rng.random((14, 12)) < share * LAYERS) * rng.beta(1.5, 3, (14, 12))


def sampled(rng: np.random.Generator, true: np.ndarray, n: int = 40) -> np.ndarray:
    """Scores of n samples of three tokens each."""
    return rng.binomial(3, np.repeat(true[None], n, 0)) / 3


# ---------------------------------------------------------------- measures


def test_similarity_of_equal_and_of_disjoint_heads() -> None:
    a = np.array([[0.9, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert [m.of(a, a) for m in measures(0.1)] == pytest.approx([1, 1, 0, 0])
    assert [m.of(a, a[::-1]) for m in measures(0.1)] == pytest.approx([0, -1 / 3, 1, 0], abs=0.02)
    assert np.isnan(jaccard(a > 1, a > 1)) and np.isnan(spearman(a, np.zeros_like(a)))
    x, y = np.random.default_rng(0).integers(4, size=(2, 3, 5))
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x.ravel(), y.ravel())[0])


def test_chance_exchanges_heads_within_layers() -> None:
    """Where every layer is constant, an exchange changes nothing; where one head of a layer scores, it is found."""
    flat = np.repeat(LAYERS, 12, 1)
    chance, more, less = against_chance(measures(0.1)[1], flat, flat, 0, 200)
    assert (chance, more, less) == (pytest.approx(1.0), 1.0, 1.0)
    one = np.zeros((4, 5))
    one[2, 3] = 0.8
    chance, more, less = against_chance(measures(0.1)[0], one, one, 0, 2000)
    assert chance == pytest.approx(1 / 5, abs=0.03) and more == pytest.approx(1 / 5, abs=0.03) and less == 1.0
    _, more, less = against_chance(measures(0.1)[2], one, one, 0, 2000)  # a distance of 0 is the most similar
    assert more == pytest.approx(1 / 5, abs=0.03) and less == 1.0
    assert np.isnan(against_chance(measures(0.1)[3], one, one, 0, 10)).all()


def test_the_same_heads_are_as_similar_as_noise_allows_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    a, b = scores_of(rng), scores_of(rng)
    compared = measures(0.1)
    same = compare_scores(compared, sampled(rng, a), sampled(rng, a), 0, 200)
    other = compare_scores(compared, sampled(rng, a), sampled(rng, b), 0, 200)
    assert list(same["measure"]) == [m.name for m in compared]
    for i in (0, 1):
        assert same.loc[i, "halves"] == pytest.approx(same.loc[i, "same heads"], abs=0.05)
        assert same.loc[i, "p different"] > 0.05 > same.loc[i, "p more"]
        assert other.loc[i, "p different"] == pytest.approx(1 / 201)
        assert other.loc[i, "halves"] < other.loc[i, "same heads"] - 0.2
    assert np.all(same["low"] <= same["value"]) and np.all(same["value"] <= same["high"])


def test_the_noise_ceiling_is_that_of_halves() -> None:
    """Two samples of one kind: its halves are single samples."""
    a = np.array([[[0.9, 0.0, 0.0]], [[0.9, 0.9, 0.0]]])
    across, within = noise_ceiling(measures(0.1)[:1], a, a, 0, draws=400)
    assert within == [0.5]  # {0} against {0, 1}
    assert across[0] == pytest.approx(0.75, abs=0.05)  # equal halves half of the time


@pytest.mark.slow
def test_tests_of_similarity_err_at_their_rate() -> None:
    """Independent heads in the same layers, and the same heads twice: p <= 0.05 in about 5% of cases."""
    rng, runs = np.random.default_rng(0), 100
    jaccards, ranks = measures(0.1)[:2]
    more, different = np.zeros(2), np.zeros(2)
    for r in range(runs):
        a, b = scores_of(rng), scores_of(rng)
        more += [against_chance(m, a, b, r, 99)[1] <= 0.05 for m in (jaccards, ranks)]
        found = different_p([jaccards, ranks], sampled(rng, a), sampled(rng, a), r, 99)
        different += [p <= 0.05 for p in found]
    assert (more <= 0.11 * runs).all() and (more > 0).all()
    assert (different <= 0.11 * runs).all() and (different > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("n", [40, 200])
def test_half_sampling_covers_what_so_many_samples_give(n: int) -> None:
    rng, runs = np.random.default_rng(n), 100
    a = scores_of(rng, 0.3)
    b = np.where(rng.random(a.shape) < 0.5, a, scores_of(rng, 0.3))
    for measure in measures(0.1):
        expected = np.mean([measure.of(sampled(rng, a, n).mean(0), sampled(rng, b, n).mean(0)) for _ in range(200)])
        covered = 0
        for r in range(runs):
            x, y = sampled(rng, a, n), sampled(rng, b, n)
            found = half_sampling(lambda x, y, m=measure: m.of(x.mean(0), y.mean(0)), x, y, seed=r, draws=60)
            covered += found.low <= expected <= found.high
        assert 0.88 * runs <= covered <= runs, measure.name


# ---------------------------------------------------------------- characters


def character_scores(rng: np.random.Generator, true: np.ndarray, n: int = 20) -> Scores:
    samples = (rng.random((n, *true.shape)) < true).astype(float)
    return Scores("ocr", samples, samples, np.ones(true.shape), n, n)


def test_group_tests_find_the_one_group_and_column() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(5), 20)
    values = rng.normal(size=(100, 8))
    values[groups == 3, 6] += 2
    values[:, 7] = 1.0
    t, p = group_tests(values, groups, 0, 200)
    assert t.shape == p.shape == (5, 8) and np.unravel_index(p.argmin(), p.shape) == (3, 6)
    assert p[3, 6] == 1 / 201 and (np.delete(p.ravel(), 3 * 8 + 6) > 0.05).all()
    assert (t[:, 7] == 0).all() and (p[:, 7] == 1).all()
    inside, outside = values[groups == 3, 6], values[groups != 3, 6]  # t by hand, with the spread of all values
    expected = (inside.mean() - outside.mean()) / (values[:, 6].std() * np.sqrt(1 / 20 + 1 / 80))
    assert t[3, 6] == pytest.approx(expected)


def test_a_head_that_reads_one_character_is_found_and_scores_are_of_the_other_pages() -> None:
    rng, true = np.random.default_rng(0), np.full((2, 3), 0.3)
    scored = [character_scores(rng, true) for _ in "abc"]
    special = true.copy()
    special[1, 2] = 1.0
    scored.append(character_scores(rng, special))
    tests = specific_table("abcd", scored, 0)
    assert len(tests) == 4 * 6 and [tests.loc[0, name] for name in ("character", "head", "score")] == ["d", "1.2", 1.0]
    assert min(tests["p"]) < 0.01 and np.all(tests["p"].to_numpy()[1:] > 0.05)
    others = np.concatenate([s.samples for s in scored[:3]])[:, 1, 2].mean()
    assert tests.loc[0, "score, others"] == pytest.approx(others)
    table = top_table("abcd", scored)
    top = table[(table["character"] == "d") & (table["rank"] == 1)].iloc[0]
    assert (top["head"], top["score"], top["n"]) == ("1.2", 1.0, 10)


@pytest.mark.slow
def test_characters_that_are_alike_have_no_head_of_their_own_and_top_scores_are_covered() -> None:
    """Scores of published sparsity, equal for all characters: tests err in 5%, intervals cover 90 to 98%."""
    rng = np.random.default_rng(0)
    true = np.concatenate([rng.uniform(0.5, 0.7, 8), rng.uniform(0.3, 0.5, 22), rng.uniform(0.1, 0.3, 38)])
    true = np.concatenate([true, rng.uniform(0, 0.1, 100)]).reshape(14, 12)
    errs, covered = 0, []
    for r in range(40):
        scored = [character_scores(rng, true) for _ in range(10)]
        errs += int(min(specific_table("0123456789", scored, r)["p"]) <= 0.05)
        for row in top_table("0123456789", scored).to_dict("records"):
            layer, head = map(int, str(row["head"]).split("."))
            covered.append(row["low"] <= true[layer, head] <= row["high"])
    assert errs <= 5
    assert 0.90 <= np.mean(covered) <= 0.98
