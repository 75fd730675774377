"""Numbers that overflowed: that they did, where it began, and what to do."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.errors import NotFiniteError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.forward_pass import Recorder, are_finite
from hooked_vlm.nn.hooks import is_quadratic

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@torch.no_grad()
def first_not_finite(model: "HookedVLM", inputs: VLMInputs) -> str:
    """Name the first hook point of a pass, under the hooks that are set, with a number that is infinite or none.

    Empty if there is no such number. Scores and patterns, in which minus infinity is a mask, are left out.
    """
    found = ""

    def look(name: str, x: Tensor) -> None:
        nonlocal found
        if not found and not is_quadratic(name) and not bool(torch.isfinite(x).all()):
            found = name

    past = model.new_kv_cache(*inputs.shape)  # so that hooks find the step that they may ask for
    model(inputs, return_type=None, past_kv_cache=past, recorder=Recorder(look))
    return found


def check_finite(model: "HookedVLM", inputs: VLMInputs, logits: Float[Tensor, "*dims d_vocab"]) -> None:
    """Refuse logits of which the largest is infinite or not a number.

    Args:
        logits: of a pass over `inputs` under the hooks that are set now.

    Raises:
        NotFiniteError: says where it begins, and what to do.
    """
    if not are_finite(logits):
        raise NotFiniteError(described(model, inputs, "the logits"))


def described(model: "HookedVLM", inputs: VLMInputs, what: str) -> str:
    """Say that numbers are not finite, where it begins, and what to do."""
    begins = first_not_finite(model, inputs)
    where = f"it begins at {begins}" if begins else f"no activation shows it in one pass over {inputs}"
    advice = "are weights, inputs and hooks finite?"
    if model.cfg.dtype == torch.float16:
        advice = "float16 holds numbers up to 65,504 only: try bfloat16"
    return f"{what} are not finite numbers; {where}; {advice}"
