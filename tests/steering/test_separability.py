"""Separability: AUC, p and interval against definitions and simulations; a planted direction is found, noise is not."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from hooked_vlm.errors import InputError
from hooked_vlm.steering.contrast import (
    CHOOSE,
    FIT,
    REPORT,
    among,
    best_column,
    mean_difference,
    projections,
    split_parts,
)
from hooked_vlm.steering.separability import area, area_interval, area_p, separability_of, unit_means


def streams(rng: np.random.Generator, n: int, shift: float, d_model: int = 24) -> torch.Tensor:
    """[item, 2 layers, d_model]: noise, with a shift along the first axis in layer 1."""
    x = rng.normal(size=(n, 2, d_model))
    x[:, 1, 0] += shift
    return torch.from_numpy(x).float()


def held_out(rng: np.random.Generator, shift: float) -> tuple[Any, int]:
    """Separability and best layer of sets that differ by a shift in layer 1."""
    sets = streams(rng, 32, shift), streams(rng, 32, 0.0)
    names = [[f"{kind}{i}" for i in range(32)] for kind in "ab"]
    parts = split_parts(names[0], names[1], seed=int(rng.integers(2**31)))
    vectors = mean_difference(sets[0][among(parts[0], FIT)], sets[1][among(parts[1], FIT)])
    both = [projections(x, vectors) for x in sets]
    scores = {
        part: [unit_means(x, name, among(own, part).numpy()) for x, name, own in zip(both, names, parts, strict=True)]
        for part in (CHOOSE, REPORT)
    }
    ours, theirs = scores[REPORT]
    return separability_of(ours, theirs, (0, 1)), best_column(scores[CHOOSE][0], scores[CHOOSE][1])


def test_a_planted_direction_is_found() -> None:
    found, best = held_out(np.random.default_rng(0), shift=20.0)
    assert best == 1 and found["AUC"][1] == 1.0 and found["p, adjusted"][1] < 0.001
    assert found["low"][1] < 0.95 and found["high"][1] == 1.0


def test_noise_is_not_separated_and_its_p_is_uniform() -> None:
    rng = np.random.default_rng(1)
    found = [held_out(rng, shift=0.0)[0] for _ in range(150)]
    areas, p = (np.array([table[name][1] for table in found]) for name in ("AUC", "p"))
    assert abs(areas.mean() - 0.5) < 0.03
    assert stats.kstest(p, "uniform").pvalue > 0.01
    adjusted = np.array([table["p, adjusted"].min() for table in found])
    assert (adjusted < 0.05).mean() < 0.1
    covered = np.mean([table["low"][1] <= 0.5 <= table["high"][1] for table in found])
    assert covered > 0.9


@pytest.mark.parametrize("seed", range(5))
def test_the_area_is_the_share_of_pairs_in_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = rng.integers(0, 6, 7).astype(float), rng.integers(0, 6, 5).astype(float)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in ours for b in theirs]
    assert area(ours, theirs) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("seed", range(5))
def test_p_is_the_share_of_all_permutations_of_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=8)
    ours, theirs = scores[:4], scores[4:]
    drawn = []
    for chosen in combinations(range(8), 4):
        labels = np.isin(np.arange(8), chosen)
        drawn.append(area(scores[labels], scores[~labels]))
    assert area_p(ours, theirs) == pytest.approx(np.mean(np.array(drawn) >= area(ours, theirs) - 1e-9))


@pytest.mark.parametrize(("true", "sizes"), [(0.5, (6, 6)), (0.8, (8, 12)), (0.95, (10, 10)), (0.95, (25, 15))])
def test_intervals_cover_the_area_of_normal_scores(true: float, sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    shift = np.sqrt(2) * stats.norm.ppf(true)
    covered = 0
    for _ in range(400):
        found = area(rng.normal(shift, 1, sizes[0]), rng.normal(0, 1, sizes[1]))
        low, high = area_interval(found, *sizes)
        assert 0 <= low <= found <= high <= 1 and high > low
        covered += low <= true <= high
    assert 0.91 <= covered / 400 <= 1.0


def test_the_ends_solve_newcombes_equation() -> None:
    m, n, auc = 7, 9, 0.9
    for end in area_interval(auc, m, n):
        star = (m + n) / 2 - 1
        variance = end * (1 - end) * (1 + star * (1 - end) / (2 - end) + star * end / (1 + end)) / (m * n)
        assert (auc - end) ** 2 == pytest.approx(stats.norm.ppf(0.975) ** 2 * variance, rel=1e-6)
    low, high = area_interval(1.0, m, n)
    assert 0.6 < low < 1 and high == 1.0
    assert area_interval(0.0, m, n) == pytest.approx((0.0, 1 - low))


@pytest.mark.parametrize("seed", range(4))
def test_units_stay_whole_and_every_part_has_its_share(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shared, own = [f"s{i}" for i in range(9)], [f"a{i}" for i in range(8)]
    ours, theirs = [*shared, *own, *own], [*shared, *shared, *(f"b{i}" for i in range(13))]
    ours, theirs = rng.permutation(ours).tolist(), rng.permutation(theirs).tolist()
    parts = split_parts(ours, theirs, seed)
    of_unit: dict[str, set[str]] = {}
    for names, own_parts in zip((ours, theirs), parts, strict=True):
        for name, part in zip(names, own_parts, strict=True):
            of_unit.setdefault(name, set()).add(part)
        counts = {part: len({n for n, p in zip(names, own_parts, strict=True) if p == part}) for part in set(own_parts)}
        assert counts[FIT] >= counts[REPORT] >= counts[CHOOSE] >= 2
    assert all(len(found) == 1 for found in of_unit.values())
    assert split_parts(ours, theirs, seed) == parts != split_parts(ours, theirs, seed + 1)


def test_units_are_averaged_before_they_are_tested() -> None:
    values = np.arange(10.0).reshape(5, 2)
    found = unit_means(values, ["b", "a", "b", "c", "a"], np.array([True, True, True, False, True]))
    assert found.tolist() == [[2.0, 3.0], [5.0, 6.0]]


def test_projections_are_components_and_a_vector_of_zeros_has_none() -> None:
    x = torch.tensor([[[3.0, 4.0], [1.0, 2.0]]])
    assert projections(x, torch.tensor([[0.0, 2.0], [0.0, 0.0]])).tolist() == [[4.0, 0.0]]


def test_too_few_units_are_refused() -> None:
    with pytest.raises(InputError, match="negative set has 7"):
        split_parts([f"a{i}" for i in range(9)], [f"b{i % 7}" for i in range(20)], 0)
