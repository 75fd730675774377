"""Attention between patches of the vision tower, as a page: click a patch to see where it attends."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import in_range
from hooked_vlm.nn.hooks import HookPoint
from hooked_vlm.viewer.scene import Boxes, one_row, patch_scene
from hooked_vlm.viewer.view import Chip, View, view_of

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

MOST_VALUES = 32 * 28 * 28 * 1024
"""Largest number of values in a page; fewer patches are shown where more would be needed."""


@torch.no_grad()
def vision_attention(
    model: "HookedVLM",
    inputs: VLMInputs,
    image: int = 0,
    *,
    patches: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    images: Any = None,
    boxes: Boxes | None = None,
    title: str = "Where the vision tower looks",
) -> View:
    """The attention of patches to the patches of their image, or of their tile, in every head of the vision tower.

    The other tiles of a tiled image stay clear: attention does not cross them. What goes to a tile's class token is
    given beside the maps.

    Args:
        inputs: one prompt with images.
        patches: patches that can be clicked, numbered row by row (in a tiled image tile by tile, the thumbnail last).
            By default all, or as many as a page holds, evenly spread.
        layers: of the vision tower; all by default.

    Raises:
        InputError: no such image, patch or layer.
    """
    inputs = one_row(model.as_inputs(inputs)).with_image_features(None)
    layout, tower = inputs.image_grid(image), model.cfg.vision
    assert tower is not None  # there is an image
    chosen = in_range(layers, tower.n_layers_run, "layer")
    asked = _asked(layout.n_patches, len(chosen) * tower.n_heads, patches)
    first = sum(t for t, _, _ in inputs.image_grid_thw.tolist()[:image])  # pyright: ignore[reportOptionalMemberAccess]
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def watch(z: Tensor, hook: HookPoint) -> None:
        found[hook.layer()] = _rows(hook.ctx["attention"], first, layout.tower_order, asked, tower.class_token)

    with model.hooks(fwd_hooks=[(f"vision.blocks.{layer}.attn.hook_z", watch) for layer in chosen]):
        model.encode_images(inputs)
    values = np.stack([found[layer][0] for layer in chosen], 1)
    to_class = np.stack([found[layer][1] for layer in chosen], 1)
    scene = patch_scene(inputs, image, layout.patches, images, () if boxes is None else boxes)
    return view_of(
        scene,
        values,
        [Chip(f"patch {patch}", "row", row) for row, patch in enumerate(asked)],
        chosen,
        range(tower.n_heads),
        to_class if tower.class_token else None,
        title=title,
        note="Click a patch to see which patches it looks at.",
        unit="patch",
        facts=(("model", model.cfg.model_name),),
        quantity="attention",
        elsewhere="class token",
        picks=tuple(scene.place_of(patch) for patch in asked),
    )


def _asked(n_patches: int, n_maps: int, patches: Sequence[int] | None) -> list[int]:
    if patches is None:
        n = min(n_patches, max(1, MOST_VALUES // (n_maps * n_patches)))
        return np.unique(np.linspace(0, n_patches - 1, n).round().astype(int)).tolist()
    for patch in patches:
        if not 0 <= patch < n_patches:
            raise InputError(f"there is no patch {patch}: the image has patches 0 to {n_patches - 1}")
    if not len(patches):
        raise InputError("there are no patches to ask for: patches is empty")
    return list(patches)


def _rows(
    call: Any, first: int, order: Int[np.ndarray, "tile patch"], asked: Sequence[int], has_class_token: bool
) -> tuple[Float[np.ndarray, "row head image_patch"], Float[np.ndarray, "row head"]]:
    """Attention of the selected patches, by number of the patch, and to the class token."""
    values = np.full((len(asked), call.q.shape[2], order.size), np.nan, np.float32)
    to_class = np.zeros(values.shape[:2], np.float32)
    for tile, numbers in enumerate(order):
        own = call.rows(first + tile, first + tile + 1)
        slot = {int(number): at + has_class_token for at, number in enumerate(numbers)}
        rows = [row for row, patch in enumerate(asked) if patch in slot]
        if not rows:
            continue
        queries = torch.tensor([[slot[asked[row]] for row in rows]], device=call.q.device)
        pattern = own.pattern(queries)[0].transpose(0, 1).float().cpu().numpy()
        patches = pattern[..., has_class_token : has_class_token + len(numbers)]
        for row, heads, whole in zip(rows, patches, pattern, strict=True):
            values[row][:, numbers] = heads
            to_class[row] = whole[:, 0] if has_class_token else 0
    return values, to_class
