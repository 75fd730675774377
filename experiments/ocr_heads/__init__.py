"""OCR heads (arXiv 2505.15865): which attention heads read text in images.

`run(OcrHeadsConfig(...))` scores every head, selects the OCR heads, masks them against random heads and
writes tables and pictures; `hooked-vlm ocr-heads` is the same from the command line.
"""

from hooked_vlm.experiments.ocr_heads.config import OcrHeadsConfig as OcrHeadsConfig
from hooked_vlm.experiments.ocr_heads.config import Protocol as Protocol
from hooked_vlm.experiments.ocr_heads.study import OcrHeadsResult as OcrHeadsResult
from hooked_vlm.experiments.ocr_heads.study import run as run
