"""Numbers a section of the report ends with, kept for comparing models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_vlm.analysis.statistics import Estimate, bootstrap_means

Findings = dict[str, Estimate]
"""By name."""


def as_table(findings: Mapping[str, Estimate]) -> pd.DataFrame:
    """One row each: `measure`, `value`, `low`, `high`, `n`."""
    return pd.DataFrame([row(e, measure=name) for name, e in findings.items()])


def row(estimate: Estimate, **labels: Any) -> dict[str, Any]:
    """A table's row: labels, then the number with its interval and n."""
    return labels | {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}


def band(values: Sequence[Any] | Float[np.ndarray, "image x"], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over images with its interval, point by point; images that are not numbers are left out."""
    stacked = np.asarray(values, dtype=float)
    stacked = stacked[~np.isnan(stacked).any(1)]
    if not len(stacked):
        gone = np.full(np.asarray(values).shape[1], np.nan)
        return gone, gone, gone
    return stacked.mean(0), *bootstrap_means(stacked, seed)
