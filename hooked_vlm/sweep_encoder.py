"""Runs of a sweep that change the image side: the vision tower for many of them at once, each from its first layer on.

What they hand the decoder enters it as an edit of `hook_embed`, so that from there on they are runs like any other.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.hooks import call_told, is_vision
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.interventions.base import EMBEDDING, Hooks, Intervention
from hooked_vlm.sweep_plan import first_vision_layer
from hooked_vlm.sweep_run import Edits, on_own_rows
from hooked_vlm.vision import PatchRun


@dataclass(frozen=True, eq=False)
class Encoded(Intervention):
    """A run whose image side is done: its features enter the decoder, where the rest of its hooks follow."""

    original: Intervention
    features: Float[Tensor, "token d_model"]

    @property
    def finds_positions(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.original.finds_positions

    def hooks(self, model: Any, inputs: VLMInputs) -> Hooks:
        spans = []
        start = 0
        for visual in inputs.in_feature_order:
            spans.append((visual.row, visual.start, self.features[start : start + visual.n_tokens]))
            start += visual.n_tokens

        def enter(x: Tensor, hook: Any) -> Tensor:
            first = hook.ctx["first_position"]
            for row, at, features in spans:
                x[row, at - first : at - first + len(features)] = features.to(x)
            return x

        behind = [(name, fn) for name, fn in self.original.hooks(model, inputs) if not is_vision(name)]
        return [("hook_embed", enter), *behind]


@dataclass(frozen=True, eq=False)
class PlainEncoding:
    """The image side without any intervention."""

    streams: dict[int, Float[Tensor, "patch d_model_vision"]]
    """Packed patches that enter a layer of the vision tower; also `EMBEDDING`, and the projector (number of layers)."""
    features: Float[Tensor, "token d_model"]

    @classmethod
    def of(cls, model: Any, inputs: VLMInputs, layers: set[int]) -> "PlainEncoding":
        """`layers` are those that runs begin at."""
        if inputs.image_features is not None:
            return cls({}, inputs.image_features)
        cfg, streams = model.cfg.vision, {}
        run = PatchRun.of(inputs.grids, cfg, inputs.device, model.cfg.use_attn_result)
        pixels = [p for p in (inputs.pixel_values, inputs.pixel_values_videos) if p is not None]
        stream = model.vision.embed(torch.cat(pixels), cfg)
        for layer in range(EMBEDDING, cfg.n_layers_run):
            if layer in layers:
                streams[layer] = stream
            stream = stream if layer == EMBEDDING else model.vision.blocks[layer](stream, run, layer)
        streams[cfg.n_layers_run] = stream
        return cls(streams, model.projector(stream, inputs.grids, cfg, run))


def encoded(
    model: Any, inputs: VLMInputs, plain: PlainEncoding, interventions: Sequence[Intervention]
) -> list[Encoded]:
    """Runs in the order of their first layers in the vision tower, with their image sides done."""
    n, n_tokens = len(interventions), len(plain.features)
    with model.hooks(fwd_hooks=_hooks(model, inputs, interventions, n_tokens)):
        if inputs.image_features is None:
            features = _encode(model, inputs, plain, [first_vision_layer(iv, model, inputs) for iv in interventions])
        else:
            features = plain.features.repeat(n, 1)
        features = call_told(model.hook_image_features, features, {})
    return [Encoded(iv, own) for iv, own in zip(interventions, features.view(n, n_tokens, -1), strict=True)]


def _encode(
    model: Any, inputs: VLMInputs, plain: PlainEncoding, layers: Sequence[int]
) -> Float[Tensor, "token d_model"]:
    cfg, n_layers = model.cfg.vision, model.cfg.vision.n_layers_run
    stream = plain.streams[n_layers][:0]
    per_run = len(plain.streams[n_layers])
    run, n_runs = None, 0
    for layer in range(EMBEDDING, n_layers + 1):
        joining = list(layers).count(layer)
        if joining:
            joined = plain.streams[layer].repeat(joining, 1)
            stream = torch.cat((stream.to(joined.device), joined))
            n_runs = len(stream) // per_run
            run = PatchRun.of(inputs.grids * n_runs, cfg, inputs.device, model.cfg.use_attn_result)
        if run is None or layer == n_layers:
            continue
        block = None if layer == EMBEDDING else model.vision.blocks[layer]
        embedded = run.to(stream.device).hook
        stream = embedded(model.vision.hook_embed, stream) if block is None else block(stream, run, layer)
    assert run is not None
    return model.projector(stream, inputs.grids * n_runs, cfg, run)


def _hooks(model: Any, inputs: VLMInputs, interventions: Sequence[Intervention], n_tokens: int) -> Hooks:
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
