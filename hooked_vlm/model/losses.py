"""The next-token loss over text."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.forward_pass import block_spans

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


def loss_fn(
    model: "HookedVLM",
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Any,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    per_token: bool = False,
) -> Float[Tensor, "..."]:
    """Return the cross-entropy of each next token, in float32 at least.

    Neither padding nor placeholders of images are predicted.

    Args:
        tokens: a `VLMInputs`, or token ids [batch, pos].
        attention_mask: 0 where ids are padding; a `VLMInputs` has its own.
        per_token: [batch, pos - 1], zero where nothing is predicted, in place of the mean.

    Raises:
        InputError: logits of another number of positions, a mask beside a `VLMInputs`, or tokens that see their own
            target because a prompt's tokens see each other both ways.
    """
    if attention_mask is not None and isinstance(tokens, VLMInputs):
        raise InputError("these inputs have an attention_mask of their own: leave it out")
    if attention_mask is not None:
        inputs = VLMInputs(tokens, model.input_spec(), attention_mask=attention_mask)
    else:
        inputs = model.as_inputs(tokens)
    if logits.shape[:2] != inputs.shape:
        raise InputError(f"the loss needs the logits of all {tuple(inputs.shape)} positions, got {tuple(logits.shape)}")
    targets = inputs.tokens[:, 1:].to(logits.device)
    counted = predicted_text(inputs).to(logits.device)
    for row, start, stop in block_spans(model.cfg, inputs):
        if bool(counted[row, start : stop - 1].any()):
            raise InputError(
                f"tokens {start} to {stop - 1} of row {row} see each other both ways, the targets of this loss among "
                "them: take the loss of what follows the prompt, model.log_probs(inputs, answer)"
            )
    predictions = logits[:, :-1][counted]
    predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    if not per_token:
        return F.cross_entropy(predictions, targets[counted])
    losses = predictions.new_zeros(counted.shape)
    return losses.masked_scatter(counted, F.cross_entropy(predictions, targets[counted], reduction="none"))


def predicted_text(inputs: VLMInputs) -> Bool[Tensor, "batch next"]:
    """Positions, but for the last column, whose next token is text: neither padding nor the placeholder of an image."""
    targets, mask = inputs.tokens[:, 1:], inputs.attention_mask
    counted = (mask[:, 1:] * mask[:, :-1]).bool()
    for placeholder in inputs.spec.placeholder_ids:
        counted &= targets != placeholder
    return counted
