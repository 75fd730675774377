"""Reproduction of a paper on a model: check the model, run the study, judge every claim.

`run(ReproduceConfig("toy-qwen2-vl", paper="ocr-heads"))` writes one page; `hooked-vlm reproduce` is the same from the
command line.
"""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.experiments.common.claims import Claim, Evidence, Judgement, Number
    from hooked_vlm.experiments.reproduce.config import ReproduceConfig
    from hooked_vlm.experiments.reproduce.pipeline import Reproduction, run

__all__ = ["Claim", "Evidence", "Judgement", "Number", "ReproduceConfig", "Reproduction", "run"]
__getattr__, __dir__ = lazy_names(__name__)
