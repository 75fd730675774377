"""Settings of the code published with the paper (baekingeol/OCR_Head), by the kind of model it asks (papers 1.2, 1.4).

The two differ where the code branches on the model's name. That for Qwen2-VL is tested against the numbers that the
scripts give; that for InternVL2 was read, because its scripts need code that a checkpoint brings along.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hooked_vlm.experiments.ocr_heads.config import OFFICIAL_CODE, Protocol
from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True)
class OfficialCode:
    """How the published code measures and asks one kind of model."""

    protocol: Protocol
    reply_tokens: int
    """Length of a reply while heads are scored."""
    task_tokens: int
    """Length of a reply to a task, with heads masked or attention redistributed."""
    sink: Mapping[str, Any]
    """Options of `RedistributeSink`. The prompt of Qwen2-VL has no causal mask there; a query of InternVL2 that sees
    nothing but the sink spreads its attention over later tokens."""
    passkey_question: str
    """Asked about pages."""
    passkey_text_question: str
    """Put behind a text, which has a question of its own at its end."""


QWEN2_VL = OfficialCode(OFFICIAL_CODE, 128, 256, {"causal": False, "alone": "spread"}, "What is the pass key?", "")
INTERNVL2 = OfficialCode(
    replace(OFFICIAL_CODE, weight_by_run="reply", first_resize=None, chat=False, stop_ids=(281,)),
    32, 32, {"alone": "spread"}, "What is the passkey?", "What is the passkey?",
)  # fmt: skip
"""Its generation returns new tokens alone, so that the longest shared run is one of the reply."""

SINK_BETA = 0.4
"""What the first token keeps of its attention in the code's runs."""


def official_code(model: HookedVLM) -> OfficialCode:
    """Settings of the code for a model: those for InternVL2, or those for Qwen2-VL and every other family."""
    return INTERNVL2 if model.cfg.prompt_style == "internvl" else QWEN2_VL
