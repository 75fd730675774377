"""Intervals of regression coefficients without resampling.

From one factorisation of the Gram matrix: influence of each mask on the coefficients, and residuals as if each mask had
been left out (HC3, MacKinnon and White 1985). Residuals may vary in size with the mask, as those of a linear fit to a
model that is not linear do. Masks that belong together are left out together (CR3, Bell and McCaffrey 2002).
"""

import numpy as np
from jaxtyping import Float
from scipy import stats
from scipy.linalg import solve_triangular

Design = Float[np.ndarray, "mask part"]
Values = Float[np.ndarray, "mask"]
Coefficients = Float[np.ndarray, "part"]
SINGULAR = 1e-10
"""Relative size of a pivot of the Gram matrix below which the masks do not determine the coefficients."""


def sandwich_interval(x: Design, y: Values, penalty: float, group: int) -> tuple[Coefficients, Coefficients]:
    """95% intervals of the coefficients of least squares with an unpenalised intercept.

    With a penalty (ridge) it is an interval of the shrunken coefficients' expectation. NaN where the masks do not
    determine the coefficients.

    Args:
        group: number of consecutive masks that belong together.
    """
    centred, n = x - x.mean(0), len(y)
    gone = np.full(x.shape[1], np.nan)
    lower = factor(centred.T @ centred, penalty)
    if lower is None:
        return gone, gone
    inverse = solve_triangular(lower, np.eye(len(lower)), lower=True, check_finite=False)
    inverse = inverse.T @ inverse
    influence = centred @ inverse  # [mask, part]: the coefficients are influence.T @ y
    coefficients = influence.T @ y
    residual = y - y.mean() - centred @ coefficients
    freedom = n - 1 - np.einsum("mp,mp->", influence, centred)
    if freedom < 1:
        return gone, gone
    whole = n // group * group
    squared = np.zeros(x.shape[1])
    for part, size in ((slice(0, whole), group), (slice(whole, n), 1)):
        left_out = _left_out(influence[part], centred[part], residual[part], size, n)
        shares = (influence[part] * left_out[:, None]).reshape(-1, size, x.shape[1]).sum(1)
        squared += (shares**2).sum(0)
    reach = stats.t.ppf(0.975, freedom) * np.sqrt(squared)
    return coefficients - reach, coefficients + reach


def factor(gram: Float[np.ndarray, "part part"], penalty: float) -> Float[np.ndarray, "part part"] | None:
    """Cholesky factor (lower) of the Gram matrix plus the penalty; None where it is singular."""
    gram = gram + penalty * np.eye(len(gram))
    try:
        lower = np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        return None
    pivots = np.diag(lower) ** 2
    return lower if pivots.min() > SINGULAR * pivots.max() else None


def _left_out(influence: Design, centred: Design, residual: Values, size: int, n: int) -> Values:
    """Residuals of masks whose group did not take part in the fit: (1 - H)^-1 e within each group."""
    if not len(residual):
        return residual
    by_group = [values.reshape(-1, size, values.shape[1]) for values in (influence, centred)]
    hat = np.einsum("gip,gjp->gij", *by_group) + 1 / n
    return np.linalg.solve(np.eye(size) - hat, residual.reshape(-1, size, 1)).reshape(-1)
