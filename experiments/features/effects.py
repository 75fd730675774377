"""What features do: directly to the logits, and to the answer when they are ablated."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from hooked_vlm.analysis.intervals import FEWEST, mean_interval
from hooked_vlm.data import Sample
from hooked_vlm.features import Dictionary
from hooked_vlm.features.edits import EditFeatures
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import position_table
from hooked_vlm.lens import vocabulary
from hooked_vlm.viewer.feature_view import Logits

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

INTO_THE_STREAM = (
    "hook_embed", "hook_image_features", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out",
    "hook_mlp_out",
)  # fmt: skip
"""Hook points whose tensor is the stream, or is added to it."""


@torch.no_grad()
def direct_logits(
    model: "HookedVLM", dictionary: Dictionary, features: Sequence[int], n: int = 8
) -> list[tuple[Logits, Logits]]:
    """For each feature the tokens that its direction raises and lowers most, by the final norm and the unembedding
    alone; values are logits less their mean over the vocabulary. Empty where it is no direction of the stream."""
    name = dictionary.out_hook_name
    if name.startswith("vision.") or not name.endswith(INTO_THE_STREAM):
        return [((), ()) for _ in features]
    weight = next(model.unembed.parameters())
    directions = dictionary.W_dec[list(features)].to(weight)
    log_probs = vocabulary(model, directions)
    centred = (log_probs - log_probs.mean(-1, keepdim=True)).float().cpu()
    found = []
    for row in centred:
        order = row.argsort(descending=True).tolist()
        raised, lowered = (
            tuple((str(model.to_string([token])), float(row[token])) for token in tokens)
            for tokens in (order[:n], order[: -n - 1 : -1])
        )
        found.append((raised, lowered))
    return found


class Ablation:
    """The log-probability of samples' answers, with and without a feature."""

    def __init__(self, model: "HookedVLM", dictionary: Dictionary, samples: Sequence[Sample]) -> None:
        self.model, self.dictionary, self.samples = model, dictionary, samples
        self._plain: dict[int, float] = {}

    def effect(self, feature: int, pictures: Sequence[int]) -> str:
        """A sentence on the effect of ablating a feature on some of the samples; "" if fewer than three have an
        answer."""
        numbers = [number for number in pictures if self.samples[number].answer]
        if len(numbers) < FEWEST:
            return ""
        inputs = VLMInputs.concat([self.samples[number].inputs(self.model) for number in numbers])
        if missing := [i for i, number in enumerate(numbers) if number not in self._plain]:
            plain = answer_log_probs(self.model, inputs)
            self._plain |= {numbers[i]: float(plain[i]) for i in missing}
        ablated = answer_log_probs(self.model, inputs, EditFeatures(self.dictionary, (feature,)))
        change = ablated - np.array([self._plain[number] for number in numbers])
        low, high = mean_interval(change, seed=0)
        return (
            f"Ablated at every position, it changes the log-probability of the answer by {change.mean():+.2g} on "
            f"average over the {len(numbers)} pictures that activate it most (95% interval {float(low):+.2g} to "
            f"{float(high):+.2g})."
        )


@torch.no_grad()
def answer_log_probs(
    model: "HookedVLM", inputs: VLMInputs, edit: EditFeatures | None = None
) -> Float[np.ndarray, "batch"]:
    """Log-probability of the answer that each row ends with."""
    hooks = [] if edit is None else edit.hooks(model, inputs)
    logits = model.run_with_hooks(inputs, fwd_hooks=hooks)
    log_probs = logits[:, :-1].double().log_softmax(-1)
    answer = position_table("generated", inputs)[:, :-1]
    tokens, answered = (x[:, 1:].to(logits.device) for x in (inputs.tokens, answer))
    own = log_probs.gather(-1, tokens[..., None])[..., 0]
    return (own * answered).sum(-1).cpu().numpy()
