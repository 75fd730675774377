"""Findings: the main numbers of a report, used to compare models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_vlm.analysis.intervals import estimate_ratio, mean_interval, ratio_interval, ratio_of_means
from hooked_vlm.analysis.statistics import Estimate

Findings = dict[str, Estimate]
"""Estimates by name."""


@dataclass(frozen=True)
class Section:
    """What a section of the report found: its findings, and its sentences for the answer at the top."""

    findings: Findings
    answer: tuple[str, ...] = ()


@dataclass(frozen=True)
class OverPictures(Estimate):
    """A mean over `n` pictures, with one interval that resamples pictures and one that resamples names of objects.

    The second is for other objects than those in the data: pictures of one object are no independent observations of
    these.
    """

    low_by_name: float
    high_by_name: float
    names: int

    def __str__(self) -> str:
        ends = {
            "picture": (self.low, self.high),
            "name": (self.low_by_name, self.high_by_name),
        }
        told = [f"by {unit} {low:.3f} to {high:.3f}" for unit, (low, high) in ends.items() if not np.isnan(low)]
        counted = f"{self.n} {'picture' if self.n == 1 else 'pictures'}, {self.names} {_named(self.names)}"
        return f"{self.value:.3f} ({'; '.join([*told, counted])})"

    @property
    def brief(self) -> str:
        """The value and one interval: by name if there is one."""
        by_name = not np.isnan(self.low_by_name)
        low, high = (self.low_by_name, self.high_by_name) if by_name else (self.low, self.high)
        return f"{self.value:.2f}" if np.isnan(low) else f"{self.value:.2f}, {low:.2f} to {high:.2f}"


def _named(names: int) -> str:
    return "name" if names == 1 else "names"


def over_pictures(values: Float[np.ndarray, "picture"], names: Sequence[str], seed: int) -> OverPictures:
    """Mean over pictures with both intervals; NaN are missing observations."""
    return ratio_over_pictures(values, np.ones(len(values)), names, seed)


def ratio_over_pictures(
    values: Float[np.ndarray, "picture"], scale: Float[np.ndarray, "picture"], names: Sequence[str], seed: int
) -> OverPictures:
    """mean(values) / mean(scale) over pictures with both intervals."""
    values, labels = np.asarray(values, dtype=float), np.asarray(names)
    known = np.isfinite(values) & np.isfinite(scale)
    values, scale, labels = values[known], scale[known], labels[known]
    if not len(values):
        return OverPictures(np.nan, np.nan, np.nan, 0, np.nan, np.nan, 0)
    each, named = (estimate_ratio(values, scale, seed, groups) for groups in (None, labels))
    return OverPictures(each.value, each.low, each.high, each.n, named.low, named.high, len(np.unique(labels)))


def as_table(findings: Mapping[str, Estimate]) -> pd.DataFrame:
    """Table of findings with an observation, one row each: `measure` and the columns of `row`."""
    return pd.DataFrame([row(e, measure=name) for name, e in findings.items() if e.n])


BY_PICTURE, BY_NAME = ("low, by picture", "high, by picture"), ("low, by name", "high, by name")
"""Columns of intervals."""


def row(estimate: Estimate, **labels: Any) -> dict[str, Any]:
    """Table row: labels, the value, both intervals, and the number of pictures and names.

    An estimate without an interval by name has NaN there, and no names.
    """
    told = labels | {"value": estimate.value, BY_PICTURE[0]: estimate.low, BY_PICTURE[1]: estimate.high}
    nested = isinstance(estimate, OverPictures)
    ends = (estimate.low_by_name, estimate.high_by_name) if nested else (np.nan, np.nan)
    return told | dict(zip(BY_NAME, ends, strict=True)) | {"pictures": estimate.n, "names": _names(estimate)}


def _names(estimate: Estimate) -> int:
    return estimate.names if isinstance(estimate, OverPictures) else 0


def from_table_row(values: Mapping[str, Any]) -> Estimate:
    """The estimate that `row` wrote."""
    value, low, high = (float(values[name]) for name in ("value", *BY_PICTURE))
    low_by_name, high_by_name = (float(values[name]) for name in BY_NAME)
    n, names = int(values["pictures"]), int(values["names"])
    if not names:
        return Estimate(value, low, high, n)
    return OverPictures(value, low, high, n, low_by_name, high_by_name, names)


def ratio_band(
    gained: Float[np.ndarray, "picture x"],
    gaps: Float[np.ndarray, "picture"],
    seed: int,
    groups: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pointwise ratio of means over pictures with its interval: by picture, or by group."""
    named = None if groups is None else np.array(groups)
    return ratio_of_means(gained, gaps), *ratio_interval(gained, gaps, seed, named)


def band(
    values: Sequence[Any] | Float[np.ndarray, "picture x"], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pointwise mean over pictures with its interval by picture; pictures with NaN are left out."""
    stacked = np.asarray(values, dtype=float)
    stacked = stacked[~np.isnan(stacked).any(1)]
    if not len(stacked):
        gone = np.full(np.asarray(values).shape[1], np.nan)
        return gone, gone, gone
    return stacked.mean(0), *mean_interval(stacked, seed)
