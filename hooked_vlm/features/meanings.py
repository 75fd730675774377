"""What features stand for: which of them marks the tokens that show a label, on pictures that did not choose it.

The pictures are halved. On the first half, feature and threshold are chosen for each label by the largest F1; on the
second half that one is scored, with a 95% interval over pictures. Three comparisons go through the same choice and the
same scoring: the labels permuted between pictures (of one kind), the units of the activations themselves, with either
sign, and linear probes that the labels of the first half are regressed on: what one direction can tell at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from hooked_vlm.analysis.intervals import ratio_interval, share_interval

HALVES, PERMUTED = 1, 2
"""Purposes of random numbers, beside the seed."""
RIDGE = 1e-3
"""Penalty of a probe, as a share of the mean variance of the units."""

Labels = Bool[np.ndarray, "token label"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of labelled pictures."""

    labels: Labels
    picture: Int[np.ndarray, "token"]
    """The number of each token's picture; tokens of a picture follow each other."""
    kind: tuple[str, ...]
    """The kind of each picture."""

    def half(self, first: bool, seed: int) -> Bool[np.ndarray, "token"]:
        """The tokens of half of the pictures: every other one of each kind, in an order drawn by the seed."""
        order = np.random.default_rng([seed, HALVES]).permutation(len(self.kind))
        ordered = order[np.argsort(np.array(self.kind)[order], kind="stable")]
        return np.isin(self.picture, ordered[0 if first else 1 :: 2])

    def permuted(self, seed: Sequence[int], among: Bool[np.ndarray, "token"]) -> Labels:
        """Labels that have changed places: each picture has those of another one of its kind and size, or its own."""
        rng = np.random.default_rng([*seed, PERMUTED])
        rows = {int(number): np.flatnonzero(self.picture == number) for number in np.unique(self.picture[among])}
        groups: dict[tuple[str, int], list[int]] = {}
        for number, own in rows.items():
            groups.setdefault((self.kind[number], len(own)), []).append(number)
        found = self.labels.copy()
        for numbers in groups.values():
            for number, other in zip(numbers, rng.permutation(numbers), strict=True):
                found[rows[number]] = self.labels[rows[int(other)]]
        return found


def find_meanings(
    features: Float[np.ndarray, "token feature"],
    units: Float[np.ndarray, "token d"],
    tokens: Tokens,
    names: Sequence[str],
    *,
    seed: int = 0,
    permutations: int = 20,
    at_least: float = 0.5,
) -> pd.DataFrame:
    """One row per label: the feature that marks it best, and how well.

    Columns: label, feature, threshold, F1 with low and high (95%), precision, recall, tokens (that show the label in
    the second half), unit (F1 of the best unit of the activations, chosen alike), permuted (largest F1 of the
    permutations), probe (F1 of a ridge regression), found (F1 is larger than permuted, and the lower end of its
    interval is `at_least` or more).

    Args:
        units: the activations that the features were read from.
        permutations: how often labels are permuted.
    """
    halves = _Halves(tokens, *(tokens.half(first, seed) for first in (True, False)))
    of_features, of_units = (
        halves.split(features),
        halves.split(np.concatenate([units, -units], axis=1), above_zero=True),
    )
    probes = halves.split(units @ _ridge(units[halves.first], tokens.labels[halves.first]), above_zero=True)
    scores = halves.scored(of_features, tokens.labels)
    permuted = np.full(len(names), np.nan)
    for draw in range(permutations):
        labels = tokens.labels.copy()
        for half in (halves.first, halves.second):
            labels[half] = tokens.permuted((seed, draw), half)[half]
        permuted = np.fmax(permuted, halves.scored(of_features, labels).f1)
    compared = {"unit": halves.scored(of_units, tokens.labels).f1, "permuted": permuted}
    compared["probe"] = halves.scored(probes, tokens.labels).f1
    frame = scores.frame().assign(label=list(names), **compared)
    frame["found"] = (frame["F1"] > frame["permuted"]) & (frame["low"] >= at_least)
    described = ["label", "feature", "threshold", "F1", "low", "high", "precision", "recall", "tokens"]
    return frame.reindex(columns=[*described, *compared, "found"])


def best_thresholds(
    values: Float[np.ndarray, "unit token"], labels: Labels
) -> tuple[Float[np.ndarray, "unit label"], Float[np.ndarray, "unit label"]]:
    """The largest F1 of each unit for each label over thresholds above 0, and the threshold that has it.

    A token is marked if its value is the threshold or more; thresholds lie halfway between values. Units
    that are never above 0 have an F1 of 0 and an infinite threshold.
    """
    n_labels = labels.shape[1]
    best, threshold = np.zeros((len(values), n_labels)), np.full((len(values), n_labels), np.inf)
    positive = labels.sum(0)
    for unit, own in enumerate(values):
        active = np.flatnonzero(own > 0)
        if not len(active):
            continue
        active = active[np.argsort(-own[active], kind="stable")]
        ordered = own[active]
        last = np.append(ordered[1:] < ordered[:-1], True)  # of tokens with one value all are marked, or none
        right = labels[active].cumsum(0, dtype=np.int32)[last]
        f1 = 2 * right / (np.flatnonzero(last)[:, None] + 1 + positive)
        at = f1.argmax(0)
        distinct = np.append(ordered[last], 0.0)
        best[unit], threshold[unit] = f1[at, np.arange(n_labels)], (distinct[at] + distinct[at + 1]) / 2
    return best, threshold


@dataclass(frozen=True, eq=False)
class _Scored:
    """The unit chosen for each label, and its tokens in each picture of the second half."""

    unit: Int[np.ndarray, "label"]
    threshold: Float[np.ndarray, "label"]
    hits: Float[np.ndarray, "picture label"]
    """Marked tokens that show the label."""
    marked: Float[np.ndarray, "picture label"]
    shown: Float[np.ndarray, "picture label"]

    @property
    def f1(self) -> Float[np.ndarray, "label"]:
        return _ratio(2 * self.hits.sum(0), (self.marked + self.shown).sum(0))

    def interval(self, label: int) -> tuple[float, float]:
        """95% of the F1 over pictures with a token that is marked or shows the label; others change nothing.

        Where no token is wrong, or none right, no bootstrap has a width: then it is Wilson's interval of the share J of
        pictures that are right, as an F1, which is 2J / (1 + J) of a share J of tokens that are both among those that
        are either.
        """
        size = (self.marked + self.shown)[:, label]
        used = size > 0
        twice = 2 * self.hits[used, label]
        if not used.any():
            return np.nan, np.nan
        if not twice.any() or (twice == size[used]).all():
            share = np.array(share_interval((twice > 0).astype(float)))
            low, high = 2 * share / (1 + share)
        else:
            low, high = ratio_interval(twice, size[used], seed=0)
        return float(low), float(high)

    def frame(self) -> pd.DataFrame:
        """One row per label."""
        ends = np.array([self.interval(label) for label in range(len(self.unit))]).reshape(-1, 2)
        return pd.DataFrame(
            {
                "feature": self.unit,
                "threshold": np.where(np.isinf(self.threshold), np.nan, self.threshold),
                "F1": self.f1,
                "low": ends[:, 0],
                "high": ends[:, 1],
                "precision": _ratio(self.hits.sum(0), self.marked.sum(0)),
                "recall": _ratio(self.hits.sum(0), self.shown.sum(0)),
                "tokens": self.shown.sum(0).astype(int),
            }
        )


@dataclass(frozen=True, eq=False)
class _Halves:
    """The pictures that choose, and those that score."""

    tokens: Tokens
    first: Bool[np.ndarray, "token"]
    second: Bool[np.ndarray, "token"]

    def split(
        self, values: Float[np.ndarray, "token unit"], above_zero: bool = False
    ) -> tuple[Float[np.ndarray, "unit chosen"], Float[np.ndarray, "unit scored"]]:
        """Values of both halves; with `above_zero` shifted, so that every one of them can be a threshold."""
        shifted = values - values.min() + 1 if above_zero else values
        return shifted[self.first].T.copy(), shifted[self.second].T.copy()

    def scored(
        self, values: tuple[Float[np.ndarray, "unit chosen"], Float[np.ndarray, "unit scored"]], labels: Labels
    ) -> _Scored:
        """For each label the unit and threshold that the first half chooses, and what the second half counts."""
        best, thresholds = best_thresholds(values[0], labels[self.first])
        unit = best.argmax(0)
        threshold = thresholds[unit, np.arange(labels.shape[1])]
        marked, shown = (values[1][unit] >= threshold[:, None]).T, labels[self.second]
        picture = self.tokens.picture[self.second]
        return _Scored(unit, threshold, *(_by_picture(marks, picture) for marks in (marked & shown, marked, shown)))


def _ridge(x: Float[np.ndarray, "token d"], labels: Labels) -> Float[np.ndarray, "d label"]:
    """Directions of a ridge regression of the labels."""
    centred = (x - x.mean(0)).astype(float)
    gram = centred.T @ centred
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    return np.linalg.solve(gram, centred.T @ (labels - labels.mean(0)))


def _by_picture(
    marks: Bool[np.ndarray, "token label"], picture: Int[np.ndarray, "token"]
) -> Float[np.ndarray, "picture label"]:
    """Number of marked tokens in each picture that has tokens."""
    starts = np.flatnonzero(np.diff(picture, prepend=-1))
    return np.add.reduceat(marks.astype(float), starts, axis=0)


def _ratio(above: Float[np.ndarray, "label"], below: Float[np.ndarray, "label"]) -> Float[np.ndarray, "label"]:
    with np.errstate(invalid="ignore"):
        return above / below  # NaN where there is nothing to count
