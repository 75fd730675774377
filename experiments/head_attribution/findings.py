"""Findings: the main numbers of a report, used to compare models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_vlm.analysis.statistics import Estimate, bootstrap_means

Findings = dict[str, Estimate]
"""Estimates by name."""


def as_table(findings: Mapping[str, Estimate]) -> pd.DataFrame:
    """Table of findings, one row each: `measure`, `value`, `low`, `high`, `n`."""
    return pd.DataFrame([row(e, measure=name) for name, e in findings.items()])


def row(estimate: Estimate, **labels: Any) -> dict[str, Any]:
    """Table row: labels, then the value with its interval and n."""
    return labels | {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}


def band(values: Sequence[Any] | Float[np.ndarray, "image x"], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pointwise mean over images with its interval; images with NaN are left out."""
    stacked = np.asarray(values, dtype=float)
    stacked = stacked[~np.isnan(stacked).any(1)]
    if not len(stacked):
        gone = np.full(np.asarray(values).shape[1], np.nan)
        return gone, gone, gone
    return stacked.mean(0), *bootstrap_means(stacked, seed)
