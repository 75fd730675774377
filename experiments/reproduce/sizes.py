"""What a reproduction runs: the settings of both studies at both sizes."""

from collections.abc import Mapping
from typing import Any

from hooked_vlm.experiments.head_attribution.config import All
from hooked_vlm.experiments.ocr_heads.config import OcrHeadsConfig
from hooked_vlm.experiments.reproduce.config import ReproduceConfig

OCR_HEADS: Mapping[str, Mapping[str, Any]] = {
    "small": {
        "samples": 60,
        "lengths": (1024,),
        "permutations": 500,
        "task_samples": 40,
        "random_draws": 30,
        "case_samples": 2,
    },
    "paper": {"samples": 1200, "permutations": 2000, "task_samples": 600, "random_draws": 20, "case_samples": 100},
}
"""Paper: 600 passkeys and 600 needles, 600 samples of each task, 100 pages for each character (papers 1.2 to 1.12); 20
random draws instead of its 5, because 5 cannot reach p = 0.05."""
SINK = {"betas": (0.4,), "sink_heads": (2,)}
"""Of either size: the paper's."""
HEAD_ATTRIBUTION: Mapping[str, Mapping[str, Any]] = {"small": {"samples": 24}, "paper": {"samples": 200}}
"""The paper's number of pictures and masks is not known: 200 pictures and the study's own number of masks."""


def study_config(config: ReproduceConfig) -> OcrHeadsConfig | All:
    """The study's configuration; its results lie in a folder of the study's name."""
    shared: dict[str, Any] = {name: getattr(config, name) for name in ("model", "seed", "device", "dtype", "quiet")}
    shared |= {"out": config.out / config.paper, "ray": config.ray, "workers": config.workers, "zip": config.zip}
    if config.paper == "head-attribution":
        own = {"images": config.images, "annotations": config.annotations}
        return All(**shared, **own, **HEAD_ATTRIBUTION[config.size])
    own = {name: getattr(config, name) for name in ("compat", "text_model", "data_folder", "task_files")}
    return OcrHeadsConfig(**shared, **own, **OCR_HEADS[config.size], **SINK)
