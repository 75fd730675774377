"""Runs of a sweep that change the image side: many share passes of the vision tower, each from its first layer on.

Their features enter the decoder as an edit of `hook_embed`, after which they are runs like any other.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import EMBEDDING, Edits, Hooks, Intervention, on_own_rows
from hooked_vlm.nn.hooks import HookPoint, is_vision, running
from hooked_vlm.nn.vision import image_pass
from hooked_vlm.sweeps.plan import first_vision_layer

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True, eq=False)
class Encoded(Intervention):
    """A run whose images are encoded: its features enter the decoder, where its other hooks act."""

    original: Intervention
    features: Float[Tensor, "token d_model"]

    @property
    def position_aware(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.original.position_aware

    def hooks(self, model: "HookedVLM", inputs: VLMInputs) -> Hooks:
        spans = []
        start = 0
        for visual in inputs.in_feature_order:
            spans.append((visual.row, visual.positions, self.features[start : start + visual.n_tokens]))
            start += visual.n_tokens

        def enter(x: Tensor, hook: HookPoint) -> Tensor:
            first = hook.ctx["first_position"]
            for row, at, features in spans:
                x[row, at - first] = features.to(x)
            return x

        behind = [(name, fn) for name, fn in self.original.hooks(model, inputs) if not is_vision(name)]
        return [("hook_embed", enter), *behind]


@dataclass(frozen=True, eq=False)
class PlainEncoding:
    """The image side without any intervention."""

    streams: dict[int, Float[Tensor, "*image patch d_model_vision"]]
    """Patches that enter a layer of the vision tower; also `EMBEDDING`, and the projector (number of layers)."""
    features: Float[Tensor, "token d_model"]

    @classmethod
    def of(cls, model: "HookedVLM", inputs: VLMInputs, layers: set[int]) -> "PlainEncoding":
        """`layers` are those that runs begin at."""
        if inputs.image_features is not None:
            return cls({}, inputs.image_features)
        n_layers, streams = model.vision.n_layers_run, {}
        images = image_pass(model, inputs.grids, inputs.device)
        pixels = [p for p in (inputs.pixel_values, inputs.pixel_values_videos) if p is not None]
        stream, at = model.vision.embed(torch.cat(pixels), inputs.grids, images), EMBEDDING
        for layer in sorted({*layers, n_layers}):
            stream, at = model.vision.run(stream, images, at, layer), layer
            streams[layer] = stream
        outputs = model.projector(model.vision.normed(stream, images), inputs.grids, images)
        return cls(streams, model.projector.arrange(outputs, inputs))


def encoded(
    model: "HookedVLM", inputs: VLMInputs, plain: PlainEncoding, interventions: Sequence[Intervention]
) -> list[Encoded]:
    """Encode the images of runs, given in the order of their first layers in the vision tower."""
    n, n_tokens = len(interventions), len(plain.features)
    with model.hooks(fwd_hooks=_hooks(model, inputs, interventions, n_tokens)):
        if inputs.image_features is None:
            features = _encode(model, inputs, plain, [first_vision_layer(iv, model, inputs) for iv in interventions])
        else:
            features = plain.features.repeat(n, 1)
        here = image_pass(model, inputs.grids, inputs.device, {"inputs": inputs})
        with running(here.patches):
            features = model.hook_image_features(features)  # [image token of the batch, d_model]
    return [Encoded(iv, own) for iv, own in zip(interventions, features.view(n, n_tokens, -1), strict=True)]


def _encode(
    model: "HookedVLM", inputs: VLMInputs, plain: PlainEncoding, layers: Sequence[int]
) -> Float[Tensor, "token d_model"]:
    n_layers = model.vision.n_layers_run
    stream = plain.streams[n_layers][:0]
    joining = sorted(set(layers))
    n_runs, images = 0, None
    for layer, until in pairwise([*joining, max(n_layers, joining[-1] + 1)]):
        n, shared = list(layers).count(layer), plain.streams[layer]
        n_runs += n
        stream = torch.cat((stream.to(shared.device), shared.repeat(n, *[1] * (shared.ndim - 1))))
        images = image_pass(model, inputs.grids * n_runs, inputs.device, {"inputs": inputs})
        stream = model.vision.run(stream, images, layer, min(until, n_layers))
    assert images is not None
    outputs = model.projector(model.vision.normed(stream, images), inputs.grids * n_runs, images)
    return model.projector.arrange(outputs, inputs, n_runs)


def _hooks(model: "HookedVLM", inputs: VLMInputs, interventions: Sequence[Intervention], n_tokens: int) -> Hooks:
    """One hook for each point of the image side; each run's edits see its own images only."""
    n_images = sum(grid[0] for grid in inputs.grids)
    edits: dict[str, Edits] = defaultdict(list)
    for i, intervention in enumerate(interventions):
        for name, fn in intervention.hooks(model, inputs):
            if is_vision(name):
                edits[name].append((i, i + 1, fn))
    model.check_reachable(list(edits), inputs, {})
    per_run = {name: n_tokens if name == "hook_image_features" else n_images for name in edits}
    return [(name, on_own_rows(own, per_run[name])) for name, own in edits.items()]
