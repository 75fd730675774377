"""Attention rows, statistics and pictures."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.analysis.pictures import heatmap, overlay
    from hooked_vlm.analysis.rows import attention_rows, generate_with_rows
    from hooked_vlm.analysis.statistics import (
        Estimate,
        bootstrap,
        bootstrap_mean,
        bootstrap_means,
        bootstrap_ratios,
        paired_p,
        permutation_p,
        ratio_of_means,
        share,
    )

__all__ = [
    "Estimate", "attention_rows", "bootstrap", "bootstrap_mean", "bootstrap_means", "bootstrap_ratios",
    "generate_with_rows", "heatmap", "overlay", "paired_p", "permutation_p", "ratio_of_means", "share",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
