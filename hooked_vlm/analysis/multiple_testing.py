"""p values of a family of tests, corrected for their number."""

import numpy as np
from jaxtyping import Float, Int
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


def group_tests(
    values: Float[np.ndarray, "n column"], groups: Int[np.ndarray, "n"], seed: int, draws: int = 1000
) -> tuple[Float[np.ndarray, "group column"], Float[np.ndarray, "group column"]]:
    """Test every group and column at once: is the group's mean larger than that of all other entries?

    p values are one-sided and adjusted for the choice among all groups and columns (max-T; Westfall and Young 1993):
    the share of permutations of the groups in which the largest t of all is at least as large. A column of constants
    has t = 0 and p = 1.

    Args:
        groups: number of each entry's group, from 0.

    Returns:
        (t, p).
    """
    n, sizes = len(values), np.bincount(groups)
    member = np.eye(len(sizes))[groups].T
    spread = values.std(0)
    scaled = np.divide(values - values.mean(0), spread, out=np.zeros_like(values, dtype=float), where=spread > 1e-12)
    # sum of a group's scaled values -> difference from the others, in standard errors
    unit = np.sqrt(n / (sizes * np.maximum(n - sizes, 1)))[:, None]

    def t_of(entries: Float[np.ndarray, "n column"]) -> Float[np.ndarray, "group column"]:
        return (member @ entries) * unit

    rng, observed = np.random.default_rng([seed, 12]), t_of(scaled)
    largest = np.array([t_of(scaled[rng.permutation(n)]).max() for _ in range(draws)])
    as_large = (largest[:, None, None] >= observed - 1e-9).sum(0)
    return observed, (as_large + 1) / (draws + 1)
