"""Agreement of pictures' coefficients, by hand and with a planted cause."""

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from hooked_vlm.experiments.head_attribution.agreement import (
    cosine,
    explained,
    jaccard,
    mean_of_pairs,
    partial_correlation,
    spearman,
)


def test_similarities_by_hand() -> None:
    vectors = np.array([[3.0, 2.0, 1.0, 0.0], [4.0, 1.0, 2.0, 0.0], [0.0, 0.0, 5.0, 5.0]])
    assert cosine(vectors)[0, 1] == pytest.approx(16 / np.sqrt(14 * 21))
    assert spearman(vectors)[0, 1] == pytest.approx(0.8)
    np.testing.assert_allclose(jaccard(vectors, 2), [[1, 1 / 3, 0], [1 / 3, 1, 1 / 3], [0, 1 / 3, 1]])


def test_means_of_pairs_take_each_pair_once() -> None:
    similarity = np.array([[1.0, 0.2, 0.4], [0.2, 1.0, 0.9], [0.4, 0.9, 1.0]])
    same = np.array([[True, True, False], [True, True, False], [False, False, True]])
    assert (mean_of_pairs(similarity, same, 0).value, mean_of_pairs(similarity, same, 0).n) == (0.2, 1)
    others = mean_of_pairs(similarity, ~same, 0)
    assert others.value == pytest.approx(0.65) and others.n == 2 and others.low <= 0.65 <= others.high
    assert mean_of_pairs(similarity, np.eye(3, dtype=bool), 0).n == 0


def pair_causes(rng: np.random.Generator, n: int = 24) -> dict[str, np.ndarray]:
    names = np.arange(n) % 4
    words, looks = rng.normal(size=(4, 3))[names], rng.normal(size=(n, 6))
    same = (names[:, None] == names[None]).astype(float)
    return {"same name": same, "name similarity": cosine(words), "picture similarity": cosine(looks)}


def test_partial_correlations_are_those_of_residuals() -> None:
    rng = np.random.default_rng(5)
    causes = pair_causes(rng)
    similarity = 0.5 * causes["same name"] + 0.2 * causes["picture similarity"]
    noise = rng.normal(size=similarity.shape)
    similarity = similarity + 0.3 * (noise + noise.T)
    upper = np.triu_indices(len(similarity), 1)
    y, a, b = (square[upper] for square in (similarity, causes["same name"], causes["picture similarity"]))
    residuals = [v - LinearRegression().fit(b[:, None], v).predict(b[:, None]) for v in (y, a)]
    found = partial_correlation(similarity, causes["same name"], [causes["picture similarity"]])
    assert found == pytest.approx(np.corrcoef(*residuals)[0, 1])
    assert partial_correlation(similarity, causes["same name"], []) == pytest.approx(np.corrcoef(y, a)[0, 1])
    assert np.isnan(partial_correlation(similarity, np.ones_like(similarity), [causes["picture similarity"]]))
    twice = np.full(len(similarity), 2)
    assert partial_correlation(similarity, causes["same name"], [], twice) == pytest.approx(np.corrcoef(y, a)[0, 1])


def test_the_planted_cause_is_found_and_the_other_is_not() -> None:
    rng = np.random.default_rng(6)
    causes = pair_causes(rng)
    centres = rng.normal(size=(4, 16))
    vectors = centres[np.arange(24) % 4] + 0.5 * rng.normal(size=(24, 16))
    table = explained(cosine(vectors), causes, seed=0, draws=200)
    by_cause: Any = table.set_index(["cause", "controlled for"])
    same, looks = ("same name", "picture similarity"), ("picture similarity", "same name, name similarity")
    assert by_cause["p"][same] == pytest.approx(1 / 201) and by_cause["low"][same] > 0.5
    assert by_cause["p"][looks] > 0.05
    assert set(table["images"]) == {24} and set(table["pairs"]) == {276}
