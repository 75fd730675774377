"""Scores of attention in the vision tower, for some queries of a tile at a time: no [patch, patch] tensor is made."""

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vlm.atlas.attention import Found
from hooked_vlm.atlas.evidence import tokens_of_box
from hooked_vlm.atlas.stimuli import TEXT, Stimulus
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.attention import AttentionCall
from hooked_vlm.nn.hooks import HookPoint

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

QUERIES = 256
"""Number of queries at a time."""
SINK_SHARE = 0.01
"""Share of a tile's patches that count as sinks: those with the largest norms."""
Sums = dict[str, tuple[Float[Tensor, "head"], Float[Tensor, "head"], int]]
"""Sums of values and nulls over queries, and their number, by score."""


@dataclass(frozen=True, eq=False)
class Tile:
    """A picture, or a tile of one, as the tower sees it."""

    row: int
    """Its place in the tower's batch."""
    centres: Float[Tensor, "patch 2"]
    """Of its patches, in the tower's order, in pixels of the picture; NaN for patches that stand for no place."""
    text: Bool[Tensor, "patch"]
    """Patches with text."""
    class_tokens: int

    def distances(self, queries: Int[Tensor, "query"]) -> Float[Tensor, "query patch"]:
        """From some patches to every patch, divided by the largest from there."""
        found = torch.cdist(self.centres[queries], self.centres).nan_to_num()
        return (found / found.amax(-1, keepdim=True).clamp_min(1e-30)).float()


@torch.no_grad()
def vision_scores(model: "HookedVLM", stimulus: Stimulus) -> Found:
    """The scores of the vision tower's attention on the pictures of a stimulus, by the name of the score.

    Raises:
        InputError: a stimulus that the model cannot take.
    """
    inputs = model.as_inputs(stimulus.asked.inputs(model))
    tiles = _tiles(inputs, stimulus)
    tower = model.cfg.vision
    assert tower is not None
    sinks: dict[tuple[int, int], Bool[Tensor, "patch"]] = {}
    sums: dict[int, Sums] = {}

    def mark_sinks(x: Tensor, hook: HookPoint) -> None:
        for tile in tiles:
            sinks[hook.layer(), tile.row] = _largest(x[tile.row, tile.class_tokens :])

    def watch(z: Tensor, hook: HookPoint) -> None:
        sums[hook.layer()] = _sums(hook.ctx["attention"], tiles, sinks, hook.layer())

    hooks: list[Any] = []
    for layer in range(tower.n_layers_run):
        hooks += [(f"vision.blocks.{layer}.hook_resid_pre", mark_sinks)]
        hooks += [(f"vision.blocks.{layer}.attn.hook_z", watch)]
    with model.hooks(fwd_hooks=hooks):
        model.encode_images(inputs)
    names = [name for name, (_, _, n) in sums[0].items() if n]
    return {name: _means([sums[layer][name] for layer in sorted(sums)]) for name in names}


def _means(by_layer: list[tuple[Tensor, Tensor, int]]) -> tuple[np.ndarray, np.ndarray]:
    values = torch.stack([value / n for value, _, n in by_layer])
    return values.numpy(), torch.stack([null / n for _, null, n in by_layer]).numpy()


def _tiles(inputs: VLMInputs, stimulus: Stimulus) -> list[Tile]:
    grids = inputs.grids
    tiles, n_before = [], 0
    for image in range(inputs.n_images):
        layout = inputs.image_grid(image)
        boxes = layout.patches.boxes
        text = np.zeros(layout.n_patches, dtype=bool)
        for box in stimulus.boxes(TEXT):
            if box.image == image:
                text[tokens_of_box(layout.patches, box.box, stimulus.name)] = True
        for tile, numbers in enumerate(layout.tower_order):
            centres = torch.from_numpy((boxes[numbers, :2] + boxes[numbers, 2:]) / 2)
            own = Tile(n_before + tile, centres, torch.from_numpy(text[numbers]), inputs.spec.class_tokens)
            tiles.append(own)
        n_before += grids[image][0]
    return tiles


def _largest(x: Float[Tensor, "patch d"]) -> Bool[Tensor, "patch"]:
    """The patches with the largest norms."""
    n = max(1, int(SINK_SHARE * len(x)))
    found = torch.zeros(len(x), dtype=torch.bool)
    found[x.float().norm(dim=-1).topk(n).indices.cpu()] = True
    return found


def _sums(call: AttentionCall, tiles: list[Tile], sinks: dict[tuple[int, int], Tensor], layer: int) -> Sums:
    totals: dict[str, list[Any]] = defaultdict(lambda: [0.0, 0.0, 0])
    for tile in tiles:
        own, n = call.rows(tile.row, tile.row + 1), len(tile.centres)
        for chunk in torch.arange(n).split(QUERIES):
            at = (chunk + tile.class_tokens)[None].to(call.q.device)
            pattern = own.pattern(at)[0].float().cpu()[..., : n + tile.class_tokens]
            seen = own.visible(at)[0].float().cpu()[..., : n + tile.class_tokens]
            uniform = (seen / seen.sum(-1, keepdim=True)).expand(1, len(chunk), -1)
            values, nulls = (_of_queries(a, chunk, tile, sinks[layer, tile.row]) for a in (pattern, uniform))
            for name, value in values.items():
                total = totals[name]
                total[0], total[1] = total[0] + value.sum(-1), total[1] + nulls[name].sum(-1)
                total[2] += value.shape[-1]
    return {name: (value, null.expand_as(value), n) for name, (value, null, n) in totals.items()}


def _of_queries(
    a: Float[Tensor, "_ query key"], queries: Int[Tensor, "query"], tile: Tile, sinks: Bool[Tensor, "patch"]
) -> dict[str, Float[Tensor, "_ some_query"]]:
    """Every score for some queries of a tile, of which those of `text_region` are the ones outside of text."""
    patches = a[..., tile.class_tokens :]
    found = {
        "distance": (patches * tile.distances(queries)).sum(-1),
        "sink_patches": patches[..., sinks].sum(-1),
    }
    if tile.class_tokens:
        found["class_token"] = a[..., 0]
    if tile.text.any():
        outside = ~tile.text[queries]
        found["text_region"] = (patches[..., tile.text].sum(-1) / patches.sum(-1))[:, outside]
    return found
