"""Runs of a sweep that change the image side: many share passes of the vision tower, each from its first layer on.

Their features enter the decoder as an edit of `hook_embed`, after which they are runs like any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import EMBEDDING, Hooks, Intervention, n_patches, on_own_rows
from hooked_vlm.interventions.heads import joint_edits
from hooked_vlm.nn.hooks import HookPoint, deepstack_points, is_vision, running
from hooked_vlm.nn.vision import image_pass

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True, eq=False)
class Encoded(Intervention):
    """A run whose images are encoded: its features enter the decoder, where its other hooks act."""

    original: Intervention
    features: Float[Tensor, "token *feature d_model"]

    @property
    def position_aware(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.original.position_aware

    def hooks(self, model: "HookedVLM", inputs: VLMInputs) -> Hooks:
        places = [(visual.row, visual.positions) for visual in inputs.in_feature_order]
        n_tokens = [visual.n_tokens for visual in inputs.in_feature_order]

        def enter(features: Float[Tensor, "token d_model"], x: Tensor, hook: HookPoint) -> Tensor:
            first = hook.ctx["first_position"]
            for (row, at), own in zip(places, features.split(n_tokens), strict=True):
                x[row, at - first] = own.to(x)
            return x

        names = ["hook_embed", *deepstack_points(model.cfg.n_deepstack)]
        entering = [(name, partial(enter, own)) for name, own in zip(names, _by_place(self.features), strict=True)]
        behind = [(name, fn) for name, fn in self.original.hooks(model, inputs) if not is_vision(name)]
        return [*entering, *behind]


@dataclass(frozen=True, eq=False)
class PlainEncoding:
    """The image side without any intervention."""

    streams: dict[int, Float[Tensor, "*image patch d_model_vision"]]
    """Patches that enter a layer of the vision tower; also `EMBEDDING`, and the projector (number of layers)."""
    features: Float[Tensor, "token *feature d_model"]
    inner: dict[int, Float[Tensor, "*image patch d_model_vision"]] = field(default_factory=dict)
    """Patches that leave the blocks which DeepStack reads."""

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
        return cls(streams, model.projector.arrange(outputs, inputs), images.inner)


def _by_place(features: Float[Tensor, "token *feature d_model"]) -> tuple[Float[Tensor, "token d_model"], ...]:
    """What enters at the embedding, then behind each of the first blocks (DeepStack)."""
    return features.unbind(1) if features.ndim == 3 else (features,)


def encoded(
    model: "HookedVLM",
    inputs: VLMInputs,
    plain: PlainEncoding,
    interventions: Sequence[Intervention],
    layers: Sequence[int],
) -> list[Encoded]:
    """Encode the images of runs, given in the order of their first `layers` in the vision tower."""
    n, n_tokens = len(interventions), len(plain.features)
    with model.hooks(fwd_hooks=_hooks(model, inputs, interventions, n_tokens)):
        if inputs.image_features is None:
            features = _encode(model, inputs, plain, layers)
        else:
            features = plain.features.repeat(n, *[1] * (plain.features.ndim - 1))
        at_embedding, *inner = _by_place(features)
        here = image_pass(model, inputs.grids, inputs.device, {"inputs": inputs})
        with running(here.patches):
            embedded = model.hook_image_features(at_embedding)  # [image token of the batch, d_model]
    features = torch.stack((embedded, *inner), dim=1) if inner else embedded
    return [Encoded(iv, own) for iv, own in zip(interventions, features.split(n_tokens), strict=True)]


def _encode(
    model: "HookedVLM", inputs: VLMInputs, plain: PlainEncoding, layers: Sequence[int]
) -> Float[Tensor, "token *feature d_model"]:
    n_layers = model.vision.n_layers_run
    stream = plain.streams[n_layers][:0]
    joining = sorted(set(layers))
    n_runs, images, inner = 0, None, {}
    for layer, until in pairwise([*joining, max(n_layers, joining[-1] + 1)]):
        n, shared = list(layers).count(layer), plain.streams[layer]
        n_runs += n
        stream = torch.cat((stream.to(shared.device), shared.repeat(n, *[1] * (shared.ndim - 1))))
        images = image_pass(model, inputs.grids * n_runs, inputs.device, {"inputs": inputs})
        stream = model.vision.run(stream, images, layer, min(until, n_layers))
        inner |= images.inner
    assert images is not None
    for layer, shared in plain.inner.items():  # runs that joined behind this layer left it as it is
        own = inner.get(layer, shared[:0])
        left = n_runs - len(own) // len(shared)
        images.inner[layer] = torch.cat((own.to(shared.device), shared.repeat(left, *[1] * (shared.ndim - 1))))
    outputs = model.projector(model.vision.normed(stream, images), inputs.grids * n_runs, images)
    return model.projector.arrange(outputs, inputs, n_runs)


def _hooks(model: "HookedVLM", inputs: VLMInputs, interventions: Sequence[Intervention], n_tokens: int) -> Hooks:
    """One hook for each point of the image side; each run's edits see its own images only."""
    edits = {name: own for name, own in joint_edits(model, inputs, interventions).items() if is_vision(name)}
    model.check_reachable(list(edits), inputs, {})
    n_images = len(n_patches(inputs))
    per_run = {name: n_tokens if name == "hook_image_features" else n_images for name in edits}
    return [(name, on_own_rows(own, per_run[name])) for name, own in edits.items()]
