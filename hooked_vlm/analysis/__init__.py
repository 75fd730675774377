"""Attention rows, statistics and pictures."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.analysis.intervals import (
        estimate_mean,
        estimate_ratio,
        jackknife_interval,
        mean_interval,
        mean_p,
        ratio_interval,
        ratio_of_means,
    )
    from hooked_vlm.analysis.multiple_testing import benjamini_hochberg, holm
    from hooked_vlm.analysis.pictures import heatmap, overlay
    from hooked_vlm.analysis.rows import attention_rows, generate_with_rows
    from hooked_vlm.analysis.statistics import (
        Estimate,
        bootstrap_two_way,
        half_sampling,
        mean_score,
        paired_change,
        paired_p,
        rank_p,
        score_interval,
        share,
    )

__all__ = [
    "Estimate", "attention_rows", "benjamini_hochberg", 
    "bootstrap_two_way", "estimate_mean", "estimate_ratio", "generate_with_rows", "half_sampling",
    "heatmap", "holm", "jackknife_interval", "mean_interval", "mean_p", "mean_score", "overlay", "paired_change",
    "paired_p", "rank_p", "ratio_interval", "ratio_of_means", "score_interval", "share",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
