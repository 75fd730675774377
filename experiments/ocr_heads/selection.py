"""Selection of OCR and retrieval heads by mean score and activation frequency (papers 1.6)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from hooked_vlm.experiments.ocr_heads.scoring import Scores
from hooked_vlm.interventions import Head


def select(
    scores: Scores, threshold: float, min_frequency: float, rule: Literal["active", "inverted"]
) -> Bool[np.ndarray, "layer head"]:
    """Select heads whose mean score is above the threshold and that are active often enough.

    "active" (the paper): the score is above the threshold in at least `min_frequency` of the instances. "inverted" (its
    code): heads that are non-zero in at least 1 - `min_frequency` of the instances are dropped, and a mean equal to the
    threshold suffices.
    """
    if rule == "inverted":
        return (scores.mean >= threshold) & (scores.mean > 0) & kept_by_code(scores, min_frequency)
    return (scores.mean > threshold) & (scores.frequency(threshold) >= min_frequency)


def kept_by_code(scores: Scores, min_frequency: float) -> Bool[np.ndarray, "layer head"]:
    """Heads whose score is zero in more than a share of the instances, the only ones that the code keeps."""
    return (scores.instances == 0).sum(0) > min_frequency * len(scores.instances)


def ranked(scores: Float[np.ndarray, "layer head"]) -> list[Head]:
    """Heads by descending score; ties in order of layer and head."""
    order: Sequence[int] = np.argsort(-scores, axis=None, kind="stable").tolist()
    return [divmod(i, scores.shape[1]) for i in order]
