"""p values of a family of tests, corrected for their number."""

import numpy as np
from jaxtyping import Float
from scipy import stats


def holm(p: Float[np.ndarray, "test"]) -> Float[np.ndarray, "test"]:
    """Adjusted p that bound the probability of any false rejection in the family (Holm 1979).

    NaN (no test) stays NaN and does not count.
    """
    return _among_known(p, _step_down)


def benjamini_hochberg(p: Float[np.ndarray, "test"]) -> Float[np.ndarray, "test"]:
    """Adjusted p that bound the expected share of false rejections among all (Benjamini and Hochberg 1995), for
    independent or positively dependent tests.

    NaN (no test) stays NaN and does not count.
    """
    return _among_known(p, stats.false_discovery_control)


def _step_down(p: Float[np.ndarray, "test"]) -> Float[np.ndarray, "test"]:
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(raised)
    adjusted[order] = raised.clip(max=1.0)
    return adjusted


def _among_known(p: Float[np.ndarray, "test"], adjust) -> Float[np.ndarray, "test"]:
    p = np.asarray(p, dtype=float)
    adjusted, known = np.full_like(p, np.nan), ~np.isnan(p)
    if known.any():
        adjusted[known] = adjust(p[known])
    return adjusted
