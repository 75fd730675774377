"""Similarity of two sets or two scorings of the same heads; NaN where it is undefined."""

from typing import Any

import numpy as np
from scipy import stats


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard index of two sets, given as one boolean per head."""
    together = (a | b).sum()
    return float((a & b).sum() / together) if together else np.nan


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two scores of each head."""
    if not np.ptp(a) or not np.ptp(b):
        return np.nan
    found: Any = stats.spearmanr(a, b)  # its type is made at run time
    return float(found.statistic)
