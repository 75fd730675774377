"""What features stand for, against slow loops and planted answers."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from hooked_vlm.data import NamedBox, Sample
from hooked_vlm.features.labelled import LabelledPicture, toy_pictures
from hooked_vlm.features.meanings import Tokens, _ridge, best_thresholds, find_meanings

NAMES = ("a", "b", "c")


def made(n_pictures: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Tokens]:
    """Feature 4 marks label a without fault, feature 2 mostly b, none c; units hold noise. 10 tokens a picture."""
    rng = np.random.default_rng(seed)
    n = 10 * n_pictures
    labels = rng.random((n, 3)) < [0.1, 0.1, 0.1]
    features = rng.random((n, 6)) * (rng.random((n, 6)) < 0.2)
    features[:, 4] = np.where(labels[:, 0], 2 + rng.random(n), features[:, 4])
    features[:, 2] = np.where(labels[:, 1] & (rng.random(n) < 0.8), 2 + rng.random(n), features[:, 2])
    kinds = tuple("page" if i % 3 else "drawing" for i in range(n_pictures))
    return features, rng.normal(size=(n, 4)), Tokens(labels, np.repeat(np.arange(n_pictures), 10), kinds)


def f1(marked: np.ndarray, shown: np.ndarray) -> float:
    return float(2 * (marked & shown).sum() / (marked.sum() + shown.sum()))


def test_best_thresholds_are_those_of_a_slow_loop() -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(-1, 4, size=(5, 40)).astype(float)  # many ties, values below 0
    values[3] = -1
    labels = rng.random((40, 2)) < 0.3
    best, threshold = best_thresholds(values, labels)
    for unit in range(5):
        for label in range(2):
            tried = {t: f1(values[unit] >= t, labels[:, label]) for t in set(values[unit][values[unit] > 0])}
            assert best[unit, label] == pytest.approx(max(tried.values(), default=0.0))
            assert f1(values[unit] >= threshold[unit, label], labels[:, label]) == pytest.approx(best[unit, label])
    assert set(threshold[:3].ravel()) <= {0.5, 1.5, 2.5}
    assert np.isinf(threshold[3]).all()


def rows_of(table: pd.DataFrame) -> dict[str, dict[Any, Any]]:
    return {row["label"]: row for row in table.to_dict("records")}


def test_planted_meanings_are_found_and_others_are_not() -> None:
    features, units, tokens = made()
    found = rows_of(find_meanings(features, units, tokens, NAMES))
    assert [found[name]["found"] for name in NAMES] == [True, True, False]
    assert found["a"]["feature"] == 4 and found["a"]["F1"] == 1.0
    assert found["b"]["feature"] == 2 and 0.8 < found["b"]["F1"] < 1.0
    assert found["b"]["low"] < found["b"]["F1"] < found["b"]["high"]
    assert all(row["permuted"] < 0.5 and row["unit"] < 0.5 for row in found.values())


def test_the_score_is_that_of_the_half_that_did_not_choose() -> None:
    features, units, tokens = made()
    second = tokens.half(False, 0)
    assert not (tokens.half(True, 0) & second).any() and (tokens.half(True, 0) | second).all()
    before = find_meanings(features, units, tokens, NAMES)
    for row in before.to_dict("records"):
        marked = features[second, row["feature"]] >= row["threshold"]
        shown = tokens.labels[second, NAMES.index(row["label"])]
        assert row["F1"] == pytest.approx(f1(marked, shown)) and row["tokens"] == shown.sum()
        assert row["precision"] == pytest.approx((marked & shown).sum() / marked.sum())
        assert row["recall"] == pytest.approx((marked & shown).sum() / shown.sum())
    changed = features.copy()
    changed[second] = 0.0  # the second half chooses nothing
    after = find_meanings(changed, units, tokens, NAMES)
    for name in ("feature", "threshold"):
        assert after[name].tolist() == before[name].tolist()
    assert after["F1"].tolist() == [0, 0, 0]


def test_halves_have_every_kind_and_no_picture_twice() -> None:
    _, _, tokens = made()
    for first in (True, False):
        pictures = np.unique(tokens.picture[tokens.half(first, 3)])
        assert len(pictures) == 30 and sum(tokens.kind[i] == "drawing" for i in pictures) == 10


def test_labels_are_permuted_among_pictures_of_one_kind_and_size() -> None:
    _, _, tokens = made()
    half = tokens.half(True, 0)
    found = tokens.permuted((0, 1), half)
    assert (found[~half] == tokens.labels[~half]).all() and (found != tokens.labels).any()
    for kind in ("page", "drawing"):
        own = half & np.isin(tokens.picture, [i for i, other in enumerate(tokens.kind) if other == kind])
        before, after = (x[own].reshape(-1, 30).tolist() for x in (tokens.labels, found))
        assert sorted(before) == sorted(after) and before != after


def test_a_unit_is_chosen_with_either_sign() -> None:
    features, units, tokens = made()
    units[:, 1] = np.where(tokens.labels[:, 2], -9, units[:, 1])
    assert rows_of(find_meanings(features, units, tokens, NAMES))["c"]["unit"] == 1.0


def test_labels_of_tokens_are_what_the_picture_shows() -> None:
    tokens = np.array([[0, 0, 16, 16], [16, 0, 32, 16], [np.nan] * 4])
    mask = np.zeros((16, 32), dtype=bool)
    mask[:9, :16] = True  # 9 of 16 rows
    boxes = [NamedBox("a", (10, 2, 18, 10)), NamedBox("b", (12, 2, 20, 10)), NamedBox("z", (0, 0, 2, 2))]
    picture = LabelledPicture(Sample("x", "?", [None], boxes), "page", "fish", mask)
    found = picture.labels(tokens, ("a", "b", "fish"))
    # a: 6 of 8 columns in the first token; b: 4 of 8 in each, which is not more than half
    assert found.tolist() == [[True, False, True], [False, False, False], [False, False, False]]


def test_toy_pictures_are_drawn_anew_for_each_purpose() -> None:
    first, again, other = (list(toy_pictures(8, 0, purpose)) for purpose in (1, 1, 2))
    assert [p.kind for p in first] == ["page", "page", "transcription", "naming"] * 2
    assert [p.sample.digest() for p in first] == [p.sample.digest() for p in again]
    assert not {p.sample.digest() for p in first} & {p.sample.digest() for p in other}
    for picture in first:
        named = "".join(box.name for box in picture.sample.boxes)
        assert picture.sample.answer is not None
        assert (
            picture.object_name == picture.sample.answer if picture.kind == "naming" else picture.sample.answer in named
        )


def test_a_probe_reads_what_no_unit_says() -> None:
    features, units, tokens = made(200)
    noise = 10 * units[:, 3]
    units[:, 0] += noise + 5 * tokens.labels[:, 1]
    units[:, 2] += noise - 5 * tokens.labels[:, 1]  # b lies along their difference
    found = rows_of(find_meanings(features, units, tokens, NAMES))
    assert found["b"]["probe"] > 0.95 > found["b"]["unit"] + 0.1 and found["c"]["probe"] < 0.4


def test_a_probe_is_a_ridge_regression() -> None:
    rng = np.random.default_rng(5)
    x, labels = rng.normal(2, 3, size=(50, 4)), rng.random((50, 2)) < 0.4
    centred = x - x.mean(0)
    penalty = 1e-3 * (centred**2).sum() / 4
    extended = np.vstack([centred, np.sqrt(penalty) * np.eye(4)])
    targets = np.vstack([labels - labels.mean(0), np.zeros((4, 2))])
    np.testing.assert_allclose(_ridge(x, labels), np.linalg.lstsq(extended, targets, rcond=None)[0], rtol=1e-8)


def test_an_f1_without_an_error_has_an_interval() -> None:
    features, units, tokens = made()
    found = rows_of(find_meanings(features, units, tokens, NAMES))["a"]
    shows = tokens.labels[:, 0] & tokens.half(False, 0)
    n = len(np.unique(tokens.picture[shows]))
    right = n / (n + 1.959964**2)  # the lower end of Wilson's interval of n of n
    assert found["F1"] == 1.0 == found["high"] and found["low"] == pytest.approx(2 * right / (1 + right), rel=1e-5)
