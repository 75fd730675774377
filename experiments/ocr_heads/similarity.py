"""How alike two sets or two scorings of the same heads are; NaN where that has no answer."""

from typing import Any

import numpy as np
from scipy import stats


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Shared members of two sets, given as True and False for each head, as a share of all members."""
    together = (a | b).sum()
    return float((a & b).sum() / together) if together else np.nan


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two scores of each head."""
    if not np.ptp(a) or not np.ptp(b):
        return np.nan
    found: Any = stats.spearmanr(a, b)  # its type is made at run time
    return float(found.statistic)
