"""Interventions on features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.errors import FeatureError
from hooked_vlm.features.dictionary import FeatureDictionary
from hooked_vlm.features.vectors import dictionary_hooks
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.activations import PositionsAt, first_position_at, position_label
from hooked_vlm.interventions.base import Hooks, Intervention, Positions, layer_of, made_for, whole_numbers
from hooked_vlm.nn.hooks import HookPoint

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True, eq=False)
class EditFeatures(Intervention):
    """Activations f of some features become `scale` · f + `add`.

    The stream changes by the difference of the two reconstructions; what the dictionary does not reconstruct stays.

        EditFeatures(dictionary, (12, 40))             # ablated
        EditFeatures(dictionary, (12,), add=5.0)       # set to 5
        EditFeatures(dictionary, (12,), scale=2.0)     # doubled

    Args:
        features: their numbers.
        positions: as in `PatchActivation`.
    """

    dictionary: FeatureDictionary
    features: Sequence[int]
    scale: float = 0.0
    add: float = 0.0
    positions: Positions = None

    position_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not whole_numbers(self.features):
            raise FeatureError(f"features are a sequence of their numbers, e.g. (12,), got {self.features!r}")
        if not self.features:
            raise FeatureError("no feature is chosen: give their numbers, e.g. (12,)")
        check_features(self.dictionary, self.features)

    def first_layer(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        return layer_of(self.dictionary.hook_name, model.cfg.n_layers)

    def first_position(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        return first_position_at(self.dictionary.out_hook_name, self.positions, inputs)

    def hooks(self, model: "HookedVLM", inputs: VLMInputs) -> Hooks:
        inputs = model.as_inputs(inputs)
        where = self.where(inputs)

        def write(x: Tensor, out: Tensor, hook: HookPoint) -> Tensor:
            here = where.mask(out, hook)[..., 0].expand(out.shape[:-1])
            own = x[here.to(x.device)]
            features = self.dictionary.encode(own)
            change = self.dictionary.decode(self.edited(features), own) - self.dictionary.decode(features, own)
            return out.index_put((here,), out[here] + change.to(out))

        return made_for(inputs, dictionary_hooks(self.dictionary, write))

    def where(self, inputs: VLMInputs) -> PositionsAt:
        """The positions at the hook point that is written."""
        return PositionsAt(self.dictionary.out_hook_name, self.positions, inputs)

    def edited(
        self, features: Float[Tensor, "*at feature"], here: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "*at feature"]:
        """The activations after the edit.

        Args:
            here: where it acts, broadcast against `features`; everywhere by default.
        """
        chosen = torch.zeros(features.shape[-1], dtype=torch.bool, device=features.device)
        chosen[list(self.features)] = True
        if here is not None:
            chosen = chosen & here.to(chosen.device)
        return torch.where(chosen, self.scale * features + self.add, features)

    def __str__(self) -> str:
        numbers = ",".join(map(str, self.features))
        what = f"{self.scale:g} f + {self.add:g}"
        return f"EditFeatures {numbers} to {what} at {self.dictionary.hook_name}, {position_label(self.positions)}"


def check_features(dictionary: FeatureDictionary, features: Sequence[int]) -> None:
    """Refuse features that a dictionary does not have.

    Raises:
        FeatureError: names the first.
    """
    for feature in features:
        if not 0 <= feature < dictionary.n_features:
            raise FeatureError(f"there is no feature {feature}: they are numbered 0 to {dictionary.n_features - 1}")
