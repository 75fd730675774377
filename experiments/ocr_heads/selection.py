"""Which heads are OCR heads: the mean score and the activation frequency (papers 1.6)."""

import numpy as np
from jaxtyping import Bool, Float

from hooked_vlm.experiments.ocr_heads.config import OcrHeadsConfig
from hooked_vlm.experiments.ocr_heads.scoring import Scores


def select(scores: Scores, config: OcrHeadsConfig) -> Bool[np.ndarray, "layer head"]:
    """Heads whose mean score passes the threshold and that are active often enough.

    "active": the score is above the threshold in at least `min_frequency` of the instances, as the paper
    says. "inverted": as its code does, heads that are non-zero in at least 1 - `min_frequency` of the
    instances are dropped, and nothing else is asked.
    """
    above = scores.mean > config.threshold
    if config.measured_by.frequency_rule == "inverted":
        zeros = (scores.instances == 0).mean(0)
        return above & (zeros > config.min_frequency)
    return above & (scores.frequency(config.threshold) >= config.min_frequency)


def bootstrap_interval(
    instances: Float[np.ndarray, "instances layer head"], seed: int, draws: int = 1000
) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]:
    """95% percentile interval of the mean, instances resampled."""
    rng = np.random.default_rng([seed, 5])
    n = len(instances)
    # how often each instance is drawn: a matrix product instead of `draws` copies of the data
    counts = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n
    means = counts @ instances.reshape(n, -1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low.reshape(instances.shape[1:]), high.reshape(instances.shape[1:])
