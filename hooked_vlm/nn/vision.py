"""The vision tower and the projector.

A video counts as one image for each of its temporal patches (two frames), and a tiled image as one for each of its
tiles, because attention never crosses them. Images of different sizes are packed (`hooked_vlm.nn.packing`).

Two kinds of tower differ in what goes into the first block: Qwen2-VL's sees whole images, patches merge block
by merge block, with rotary positions; InternViT sees square tiles, patches in raster order behind a class
token, with learned positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.config import VisionConfig
from hooked_vlm.inputs.token_layout import Grid
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.block import run_blocks, vision_blocks
from hooked_vlm.nn.components import ACTIVATIONS, Norm
from hooked_vlm.nn.forward_pass import ForwardPass, Recorder
from hooked_vlm.nn.hooks import HookPoint, running, shows_modules
from hooked_vlm.nn.masks import AttentionMask
from hooked_vlm.nn.packing import Packing, Windows
from hooked_vlm.nn.rotary import Rotation, Rotations, patch_rotation

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True, eq=False)
class ImagePass:
    """A pass over images: through the tower on their patches, then through the projector on their tokens."""

    cfg: VisionConfig
    n_images: int
    patches: ForwardPass
    tokens: ForwardPass
    patch_rows: Packing | None
    """Where each image's patches lie, class token included; None if all images have the same size."""
    token_rows: Packing | None

    def by_image(self, x: Float[Tensor, "all_patches d_model"]) -> Float[Tensor, "*image patch d_model"]:
        """Patches of all images as the tower sees them."""
        if self.patches.packing is not None:
            return x
        rows = self.patch_rows
        return x.unflatten(0, (self.n_images, -1)) if rows is None else rows.to(x.device).pad(x)

    def in_a_row(self, x: Float[Tensor, "*image token d_out"]) -> Float[Tensor, "all_tokens d_out"]:
        """Tokens of all images one after the other."""
        if self.tokens.packing is not None:
            return x
        return x.flatten(0, 1) if self.token_rows is None else self.token_rows.to(x.device).pack(x)


def image_pass(
    model: "HookedVLM",
    grids: tuple[Grid, ...],
    device: torch.device,
    context: Mapping[str, Any] | None = None,
    recorder: Recorder | None = None,
) -> ImagePass:
    """A pass over the images and videos with these patch grids.

    Images of different sizes are packed, unless someone looks at modules between the hook points.
    """
    cfg = model.cfg.vision
    assert cfg is not None
    seen = [h * w for t, h, w in grids for _ in range(t)]
    ragged = min(seen) != max(seen)
    packs = ragged and not shows_modules(model)
    rotate = None
    if cfg.rope_theta is not None:
        rows_cols = torch.cat([_rows_cols(grid, cfg.merge_size) for grid in grids])
        rotate = patch_rotation(rows_cols.to(device), cfg.d_head, cfg.rope_theta)

    def over(lengths: Sequence[int], rotate: Rotation | None) -> tuple[ForwardPass, Packing | None]:
        rows, mask = None, AttentionMask(causal=False)
        if ragged:
            valid = torch.from_numpy(np.arange(max(lengths)) < np.array(lengths)[:, None]).to(device)
            rows, mask = Packing.of(lengths, device), AttentionMask(causal=False, key_valid=valid)
        if rotate is not None and not packs:
            rotate = rotate.by_row(len(lengths)) if rows is None else rotate.changed(rows.pad)
        rotations = None if rotate is None else Rotations(lambda kind: rotate)
        packing = rows if packs else None
        return ForwardPass(model.cfg, device, (mask,), rotations, None, context or {}, packing, recorder), rows

    class_tokens = 0 if cfg.tile_size is None else 1
    patches, patch_rows = over([class_tokens + n for n in seen], rotate)
    if cfg.window is not None:
        patches = _in_windows(patches, cfg, grids)
    tokens, token_rows = over([n // cfg.merge_size**2 for n in seen], None)
    return ImagePass(cfg, len(seen), patches, tokens, patch_rows, token_rows)


def _in_windows(patches: ForwardPass, cfg: VisionConfig, grids: tuple[Grid, ...]) -> ForwardPass:
    """A pass over patches with a second kind of blocks, which see windows."""
    assert cfg.window is not None
    slices = [_windows((1, *grid[1:]), cfg.merge_size, cfg.window) for grid in grids for _ in range(grid[0])]
    begins = np.cumsum([0, *(own.max() + 1 for own in slices)])
    numbers = np.full((len(slices), max(map(len, slices))), -1)  # [image, patch]
    for image, own in enumerate(slices):
        numbers[image, : len(own)] = begins[image] + own
    blocks = torch.from_numpy(numbers).to(patches.device)
    flat = numbers.ravel() if patches.packing is None else numbers[numbers >= 0]
    whole = patches.masks[0]
    return replace(
        patches,
        masks=(whole, replace(whole, blocks=blocks)),
        kind_of=cfg.layer_kind_of,
        windows=(None, Windows(flat, patches.device)),
    )


class PatchEmbed(nn.Module):
    """A linear map of flattened patches (a convolution whose stride is its kernel)."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(cfg.d_patch, cfg.d_model, bias=cfg.tile_size is not None)

    def forward(self, pixels: Float[Tensor, "patch d_patch"]) -> Float[Tensor, "patch d_model"]:
        return self.proj(pixels.to(next(self.parameters()).dtype))


class TileEmbed(nn.Module):
    """Class token and learned positions of a tile's patches."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(1, 1, cfg.d_model))
        self.positions = nn.Parameter(torch.empty(1, 1 + cfg.n_positions, cfg.d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.class_token, self.positions):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, patches: Float[Tensor, "tile patch d_model"], side: int) -> Float[Tensor, "tile seq d_model"]:
        """`patches` are `side` rows of as many, in raster order."""
        class_tokens = self.class_token.expand(len(patches), -1, -1)
        return torch.cat((class_tokens, patches), dim=1) + self.positions_for(side)

    def positions_for(self, side: int) -> Float[Tensor, "1 seq d_model"]:
        """The learned positions, of patches bicubically resized to `side` x `side`."""
        of_class, of_patches = self.positions[:, :1], self.positions[:, 1:]
        learned = round(of_patches.shape[1] ** 0.5)
        if side == learned:
            return self.positions
        full = of_patches.to(torch.promote_types(of_patches.dtype, torch.float32))
        square = full.view(1, learned, learned, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
        return torch.cat((of_class, resized.flatten(2).transpose(1, 2).to(of_class.dtype)), dim=1)


class VisionTower(nn.Module):
    """A pre-norm transformer over patches, without a final norm."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.n_layers_run = cfg.n_layers_run
        self.patch_embed = PatchEmbed(cfg)
        if cfg.tile_size is not None:
            self.tile_embed = TileEmbed(cfg)
        self.hook_embed = HookPoint()  # [image, patch, d_model]
        self.blocks = vision_blocks(cfg)

    def forward(
        self, pixels: Float[Tensor, "all_patches d_patch"] | Float[Tensor, "tile channel height width"], here: ImagePass
    ) -> Float[Tensor, "*image patch d_model"]:
        """The stream behind the last block that is read. `pixels` are as the checkpoint's image processor makes them,
        image after image."""
        with running(here.patches):
            return self.run(self.embed(pixels, here), here)

    def embed(
        self, pixels: Float[Tensor, "all_patches d_patch"] | Float[Tensor, "tile channel height width"], here: ImagePass
    ) -> Float[Tensor, "*image patch d_model"]:
        """Patch embeddings, with class tokens and learned positions where the tower has them, before `hook_embed`."""
        tiled = here.cfg.tile_size is not None
        embedded = self._embed_tiles(pixels, here.cfg.patch_size) if tiled else self.patch_embed(pixels)
        return here.by_image(embedded)

    def run(
        self, stream: Float[Tensor, "*image patch d_model"], here: ImagePass, first: int = -1, stop: int | None = None
    ) -> Float[Tensor, "*image patch d_model"]:
        """The stream through `hook_embed` (-1) and the blocks that are read, or some of these steps in a row."""
        stop = self.n_layers_run if stop is None else stop
        with running(here.patches):
            if first < 0 <= stop:
                stream = self.hook_embed(stream)  # [image, patch, d_model]
            return run_blocks(self.blocks, stream, max(first, 0), max(stop, 0))

    def _embed_tiles(
        self, pixels: Float[Tensor, "tile channel height width"], size: int
    ) -> Float[Tensor, "patch d_model"]:
        patches = pixels.unfold(2, size, size).unfold(3, size, size)  # tile channel row col y x
        side = patches.shape[2]
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
        embedded = self.patch_embed(patches).view(len(pixels), side * side, -1)
        return self.tile_embed(embedded, side).flatten(0, 1)


class Projector(nn.Module):
    """The patches of a merge block side by side, a norm before or after that, a two-layer MLP."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        hidden = cfg.d_merged if cfg.d_projector is None else cfg.d_projector
        norm_width = cfg.d_model if cfg.projector_norm == "patch" else cfg.d_merged
        self.ln = Norm(norm_width, cfg.projector_eps, centered=True)
        self.in_proj = nn.Linear(cfg.d_merged, hidden)
        self.hook_pre = HookPoint()  # [image, token, d_projector]
        self.hook_post = HookPoint()  # [image, token, d_projector]
        self.out_proj = nn.Linear(hidden, cfg.d_out)

    def forward(
        self, patches: Float[Tensor, "*image patch d_model"], grids: tuple[Grid, ...], here: ImagePass
    ) -> Float[Tensor, "all_tokens d_out"]:
        """The features of all images' tokens, one image after the other."""
        cfg = here.cfg
        if cfg.projector_norm == "patch":
            with running(here.patches):
                patches = self.ln(patches)
        merged = _side_by_side(patches, cfg) if cfg.tile_size is None else _merge_raster(patches, grids[0], cfg)
        with running(here.tokens):
            if cfg.projector_norm == "token":
                merged = self.ln(merged)
            pre = self.hook_pre(self.in_proj(merged))  # [image, token, d_projector]
            post = self.hook_post(ACTIVATIONS["gelu"](pre))  # [image, token, d_projector]
            return here.in_a_row(self.out_proj(post))


def _side_by_side(
    patches: Float[Tensor, "*image patch d_model"], cfg: VisionConfig
) -> Float[Tensor, "*image token d_merged"]:
    """The patches of merge blocks, that come block by block."""
    return patches.reshape(*patches.shape[:-2], patches.shape[-2] // cfg.merge_size**2, -1)


def _merge_raster(
    patches: Float[Tensor, "tile patch d_model"], grid: Grid, cfg: VisionConfig
) -> Float[Tensor, "tile token d_merged"]:
    """Pixel shuffle: class tokens dropped, the patches of every merge block side by side, row by row."""
    (_, rows, cols), m = grid, cfg.merge_size
    blocks = patches[:, 1:].reshape(-1, rows // m, m, cols // m, m, patches.shape[-1]).transpose(2, 3)
    if cfg.transposed_tokens:
        blocks = blocks.transpose(1, 2)
    return blocks.reshape(len(patches), rows * cols // m**2, -1)


@lru_cache(maxsize=256)
def _windows(grid: Grid, merge: int, side: int) -> Int[np.ndarray, "patch"]:
    """Number of the window of every patch, merge block by merge block; windows begin at the top left, the last row and
    column of them may be smaller."""
    rows, cols = _rows_cols(grid, merge).numpy().T // side
    return rows * (cols.max() + 1) + cols


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # it is kept
def _rows_cols(grid: Grid, merge: int) -> Int[Tensor, "patch 2"]:
    """Row and column of every patch, merge block by merge block, for each temporal slice."""
    t, h, w = grid
    rows, cols = np.indices((h, w))
    blocks = (h // merge, merge, w // merge, merge)
    in_order = [axis.reshape(blocks).transpose(0, 2, 1, 3).ravel() for axis in (rows, cols)]
    return torch.from_numpy(np.tile(np.stack(in_order, axis=-1), (t, 1)))


def encode(
    model: "HookedVLM", inputs: VLMInputs, context: Mapping[str, Any], recorder: Recorder | None
) -> Float[Tensor, "token d_model"]:
    """Run the tower and the projector over the pixels of the inputs: features of images first, then of videos."""
    pixels = [p for p in (inputs.pixel_values, inputs.pixel_values_videos) if p is not None]
    images = image_pass(model, inputs.grids, inputs.device, context, recorder)
    return model.projector(model.vision(torch.cat(pixels), images), inputs.grids, images)
