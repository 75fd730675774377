"""What a table says of a score on several stimuli: means, intervals, nulls and tests, for every head."""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from hooked_vlm.analysis.intervals import FEWEST, Ends, mean_p
from hooked_vlm.analysis.multiple_testing import holm
from hooked_vlm.analysis.statistics import score_interval
from hooked_vlm.atlas.definitions import Score

Values = Float[np.ndarray, "stimulus layer head"]


def described(score: Score, values: Values, nulls: Values | None, ends: Ends) -> pd.DataFrame:
    """The rows of `Atlas.table` for one score, with the ends of the intervals of its means."""
    _, layers, heads = values.shape
    low, high = ends
    null = np.full((layers, heads), np.nan) if nulls is None else mean_of_known(nulls)
    p = np.full((layers, heads), np.nan) if nulls is None else _paired_p(values - nulls)
    return pd.DataFrame(
        {
            "tower": score.tower,
            "layer": np.repeat(np.arange(layers), heads),
            "head": np.tile(np.arange(heads), layers),
            "score": score.name,
            "value": mean_of_known(values).ravel(),
            "low": low.ravel(),
            "high": high.ravel(),
            "null": null.ravel(),
            "p": p.ravel(),
            "p_holm": holm(p.ravel()),
            "n": np.isfinite(values).sum(0).ravel(),
        }
    )


def _paired_p(differences: Values) -> Float[np.ndarray, "layer head"]:
    """Two-sided p that the mean of the differences is 0, of each head over the stimuli on which it has a value.

    Student's t, but no less than a sign-flip test of n differences can give, 2^(1 - n): that is what a head has whose
    differences are all the same. NaN below `FEWEST` stimuli.
    """
    p = np.full(differences[0].size, np.nan)
    for heads, known in _alike(differences):
        p[heads] = np.fmax(mean_p(known), 2.0 ** (1 - len(known)))  # of a number and NaN the number
    return p.reshape(differences.shape[1:])


def share_ends(values: Values) -> Ends:
    """95% intervals of means of shares (`score_interval`), which have a width where all stimuli are 0, or all 1; NaN
    below `FEWEST` stimuli."""
    ends = np.full((2, values[0].size), np.nan)
    for heads, known in _alike(values):
        ends[:, heads] = score_interval(known.clip(0, 1))  # rounding leads beyond 1
    return ends[0].reshape(values.shape[1:]), ends[1].reshape(values.shape[1:])


def _alike(values: Values) -> Iterator[tuple[Bool[np.ndarray, "cell"], Float[np.ndarray, "stimulus own_cell"]]]:
    """Heads that have values on the same stimuli, and these values; none of fewer than `FEWEST`."""
    flat = values.reshape(len(values), -1)
    finite = np.isfinite(flat)
    for stimuli in np.unique(finite, axis=1).T:
        heads = (finite == stimuli[:, None]).all(0)
        if stimuli.sum() >= FEWEST:
            yield heads, flat[np.ix_(stimuli, heads)]


def fewest_stimuli(n_tests: int, level: float) -> int:
    """Number of stimuli from which on one of so many tests can pass at a level, after Holm's correction for all."""
    return max(FEWEST, 1 + math.ceil(math.log2(n_tests / level)))


def mean_of_known(values: Values) -> Float[np.ndarray, "layer head"]:
    """Mean over the stimuli on which a head has a value; NaN where it has none."""
    n = np.isfinite(values).sum(0)
    return np.where(n > 0, np.nansum(values, 0) / np.maximum(n, 1), np.nan)
