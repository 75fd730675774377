"""Coefficients of 784 heads from 3,920 masks: intervals by formula, 200 bootstrap resamples, and convergence.

python benchmarks/regression.py [--rounds 3]
"""

import numpy as np
from interleaved import measure, ratios, read_settings, save, show
from sklearn.linear_model import LinearRegression

from hooked_vlm.experiments.head_attribution.coefficient_intervals import sandwich_interval
from hooked_vlm.experiments.head_attribution.masks import random_masks
from hooked_vlm.experiments.head_attribution.regression import convergence, fit

HEADS, MASKS, HELD_OUT = 784, 3920, 392
RESAMPLES, TIMED = 200, 4
"""Resamples of the bootstrap in all, and those that are timed here."""


def main() -> None:
    settings = read_settings(__doc__, rounds=3)
    kept = random_masks(MASKS, HEADS, 0.5, [0])
    rng = np.random.default_rng(0)
    values = kept @ rng.normal(size=HEADS) + rng.normal(size=MASKS)
    x, y = kept[:-HELD_OUT].astype(float), values[:-HELD_OUT]

    def resampled() -> list[np.ndarray]:
        """The pairs bootstrap as it was: a weighted Gram matrix and least squares for every resample."""
        found = []
        with_intercept = np.column_stack((x, np.ones(len(x))))
        for counts in rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=TIMED).astype(float):
            gram = with_intercept.T @ (counts[:, None] * with_intercept)
            found.append(np.linalg.lstsq(gram, with_intercept.T @ (counts * y), rcond=None)[0][:-1])
        return found

    ways = {
        f"{TIMED} resamples of the pairs bootstrap": resampled,
        "intervals by formula": lambda: sandwich_interval(x, y, 0.0, 1),
        "least squares": lambda: LinearRegression().fit(x, y),
        "fit: least squares, intervals, held-out accuracy": lambda: fit(kept, values, "ols", 0.1, RESAMPLES, 0),
        "convergence in 8 steps": lambda: convergence(kept, values, "ols", 0.1, 0.0),
    }
    measured = measure(ways, settings.rounds)
    show(f"{HEADS} heads, {MASKS} masks, one picture", measured)
    first, formula = (list(measured.values())[i].seconds for i in (0, 1))
    whole = first / TIMED * RESAMPLES
    print(f"{RESAMPLES} resamples: {whole:.1f} s; the formula takes {formula:.2f} s, {whole / formula:.0f} times less")
    save(settings, "regression", {"one picture": ratios(measured), "bootstrap by formula": whole / formula})


if __name__ == "__main__":
    main()
