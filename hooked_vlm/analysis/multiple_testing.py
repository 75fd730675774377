"""Adjusted p values of a family of tests. NaN marks a test that was not made."""

import numpy as np
from jaxtyping import Float
from scipy import stats


def holm(p: Float[np.ndarray, "test"]) -> Float[np.ndarray, "test"]:
    """p values adjusted for the family-wise error rate (Holm 1979): valid however the tests depend on each other."""
    adjusted = np.asarray(p, dtype=float).copy()
    made = np.flatnonzero(~np.isnan(adjusted))
    order = made[np.argsort(adjusted[made], kind="stable")]
    scaled = adjusted[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return adjusted


def benjamini_hochberg(p: Float[np.ndarray, "test"]) -> Float[np.ndarray, "test"]:
    """p values adjusted for the false discovery rate (Benjamini and Hochberg 1995)."""
    adjusted = np.asarray(p, dtype=float).copy()
    made = ~np.isnan(adjusted)
    if made.any():
        adjusted[made] = stats.false_discovery_control(adjusted[made])
    return adjusted
