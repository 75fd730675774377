"""OCR heads (arXiv 2505.15865): which attention heads read text in images.

`run(OcrHeadsConfig(...))` runs all experiments and writes a report; `run(MaskConfig(...))` and the other configurations
run one. `hooked-vlm ocr-heads` is the same from the command line.
"""

from hooked_vlm.experiments.ocr_heads.config import CaseConfig as CaseConfig
from hooked_vlm.experiments.ocr_heads.config import CompareConfig as CompareConfig
from hooked_vlm.experiments.ocr_heads.config import MaskConfig as MaskConfig
from hooked_vlm.experiments.ocr_heads.config import OcrHeadsConfig as OcrHeadsConfig
from hooked_vlm.experiments.ocr_heads.config import Protocol as Protocol
from hooked_vlm.experiments.ocr_heads.config import ScoreConfig as ScoreConfig
from hooked_vlm.experiments.ocr_heads.config import SelectConfig as SelectConfig
from hooked_vlm.experiments.ocr_heads.config import SinkConfig as SinkConfig
from hooked_vlm.experiments.ocr_heads.config import ThoughtConfig as ThoughtConfig
from hooked_vlm.experiments.ocr_heads.run import OcrHeadsResult as OcrHeadsResult
from hooked_vlm.experiments.ocr_heads.run import run as run
