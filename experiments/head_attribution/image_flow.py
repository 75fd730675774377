"""Importance of image tokens and the object's location (arXiv 2509.17588, section 5.2)."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats

from hooked_vlm.analysis.rows import attention_rows
from hooked_vlm.experiments.head_attribution.ablation import Probe

TOP_SHARE = 0.1
"""Share of all tokens that counts as the top tokens."""


def coverage(probe: Probe) -> Float[np.ndarray, "token"] | None:
    """Share of each image token's pixels that belongs to the object; None if its location is unknown.

    Pixels are those of the picture: a token on a margin around it has few or none, a line break has none.
    """
    mask = probe.case.item.object_mask
    if mask is None:
        return None
    shares = []
    for position in probe.image:
        x0, y0, x1, y1 = probe.case.inputs.box_of_token(position) or (0, 0, 0, 0)
        pixels = mask[max(0, math.floor(y0)) : max(0, math.ceil(y1)), max(0, math.floor(x0)) : max(0, math.ceil(x1))]
        shares.append(float(pixels.mean()) if pixels.size else 0.0)
    return np.array(shares)


def attention_to_tokens(probe: Probe) -> Float[np.ndarray, "token"]:
    """Attention from the final token to each image token, summed over all heads."""
    inputs = probe.case.inputs
    last = torch.tensor([[inputs.stop[0] - 1]])
    rows = attention_rows(probe.model, inputs, last, reduce=lambda rows: rows[0, :, 0].sum(0))
    return rows.sum(0)[list(probe.image)].double().cpu().numpy()


def inside(coefficients: Float[np.ndarray, "token"], on_object: Bool[np.ndarray, "token"]) -> dict[str, Any]:
    """Measure how much of the coefficients falls on the object.

    Returns:
        The object's share of all tokens, of the top tokens and of all positive coefficients, and the probability
        that an object token has a larger coefficient than a background token (AUC; ties count half).
    """
    n_top = max(1, round(TOP_SHARE * len(coefficients)))
    top = np.argsort(-coefficients, kind="stable")[:n_top]
    positive = coefficients.clip(0)
    total = positive.sum()
    both = on_object.any() and not on_object.all()
    larger = stats.mannwhitneyu(coefficients[on_object], coefficients[~on_object]).statistic if both else np.nan
    return {
        "share of all tokens": float(on_object.mean()),
        "share of the top tokens": float(on_object[top].mean()),
        "share of positive coefficients": float(positive[on_object].sum() / total) if total else np.nan,
        "AUC": float(larger / (on_object.sum() * (~on_object).sum())) if both else np.nan,
    }
