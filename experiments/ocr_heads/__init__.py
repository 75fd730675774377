"""OCR heads (arXiv 2505.15865): which attention heads read text in images.

`run(OcrHeadsConfig(...))` runs all experiments and writes a report; `run(MaskConfig(...))` and the other configurations
run one. `hooked-vlm ocr-heads` is the same from the command line.
"""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.experiments.ocr_heads.config import (
        OFFICIAL_CODE,
        CaseConfig,
        CompareConfig,
        MaskConfig,
        OcrHeadsConfig,
        Protocol,
        ScoreConfig,
        SelectConfig,
        SinkConfig,
        ThoughtConfig,
    )
    from hooked_vlm.experiments.ocr_heads.pipeline import OcrHeadsResult, run

__all__ = [
    "OFFICIAL_CODE", "CaseConfig", "CompareConfig", "MaskConfig", "OcrHeadsConfig", "OcrHeadsResult", "Protocol",
    "ScoreConfig", "SelectConfig", "SinkConfig", "ThoughtConfig", "run",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
