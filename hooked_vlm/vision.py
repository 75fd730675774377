"""The vision tower and the projector.

Linear work runs on packed patches (`hooked_vlm.packing`). A video counts as one image for each of its temporal
patches (two frames), and a tiled image as one for each of its tiles, because attention never crosses them.

Two kinds of tower differ in what goes into the first block: Qwen2-VL's sees whole images, patches merge block
by merge block, with rotary positions; InternViT sees square tiles, patches in raster order behind a class
token, with learned positions.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.components import ACTIVATIONS, Norm
from hooked_vlm.config import VisionConfig
from hooked_vlm.decoder import vision_blocks
from hooked_vlm.hooks import HookPoint
from hooked_vlm.masks import AttentionMask
from hooked_vlm.packing import PackedRun
from hooked_vlm.rotary import Rotation, patch_rotation
from hooked_vlm.token_layout import Grid


class PatchRun(PackedRun):
    """A forward pass over packed patches of images with `lengths` patches each."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        device: torch.device,
        use_attn_result: bool,
        rotate: Rotation | None = None,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        valid = None
        if min(lengths) != max(lengths):
            valid = torch.from_numpy(np.arange(max(lengths)) < np.array(lengths)[:, None]).to(device)
        mask = AttentionMask(causal=False, key_valid=valid)
        super().__init__(lengths, mask, device, rotate, None, use_attn_result, told)

    @classmethod
    def of(
        cls,
        grids: tuple[Grid, ...],
        cfg: VisionConfig,
        device: torch.device,
        use_attn_result: bool = False,
        told: Mapping[str, Any] | None = None,
    ) -> "PatchRun":
        """A pass over the images and videos with these patch grids."""
        class_tokens = 0 if cfg.tile_size is None else 1
        lengths = tuple(class_tokens + h * w for t, h, w in grids for _ in range(t))
        rotate = None
        if cfg.rope_theta is not None:
            rows_cols = torch.cat([_rows_cols(grid, cfg.merge_size) for grid in grids])
            rotate = patch_rotation(rows_cols.to(device), cfg.d_head, cfg.rope_theta)
        return cls(lengths, device, use_attn_result, rotate, told)

    def tokens(self, grids: tuple[Grid, ...], cfg: VisionConfig) -> "PatchRun":
        """The same images as tokens: class tokens dropped, merge blocks of patches made one."""
        lengths = tuple(h * w // cfg.merge_size**2 for t, h, w in grids for _ in range(t))
        device = torch.device("cpu") if self.slots is None else self.slots.device
        return PatchRun(lengths, device, self.use_attn_result, told=self.told)


class PatchEmbed(nn.Module):
    """A linear map of flattened patches (a convolution whose stride is its kernel)."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(cfg.d_patch, cfg.d_model, bias=cfg.tile_size is not None)

    def forward(self, pixels: Float[Tensor, "patch d_patch"]) -> Float[Tensor, "patch d_model"]:
        return self.proj(pixels.to(self.proj.weight.dtype))


class TileEmbed(nn.Module):
    """What makes a tile's patches a sequence: the class token before them, and learned positions."""

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
        self.patch_embed = PatchEmbed(cfg)
        if cfg.tile_size is not None:
            self.tile_embed = TileEmbed(cfg)
        self.hook_embed = HookPoint()  # [image, patch, d_model]
        self.blocks = vision_blocks(cfg)

    def forward(
        self,
        pixels: Float[Tensor, "patch d_patch"] | Float[Tensor, "tile channel height width"],
        grids: tuple[Grid, ...],
        cfg: VisionConfig,
        run: PatchRun,
    ) -> Float[Tensor, "patch d_model"]:
        """`pixels` as the checkpoint's image processor makes them, image after image."""
        resid = self.embed(pixels, cfg)
        resid = run.to(resid.device).hook(self.hook_embed, resid)
        for layer in range(cfg.n_layers_run):
            resid = self.blocks[layer](resid, run, layer)
        return resid

    def embed(
        self, pixels: Float[Tensor, "patch d_patch"] | Float[Tensor, "tile channel height width"], cfg: VisionConfig
    ) -> Float[Tensor, "patch d_model"]:
        """Patch embeddings, with class tokens and learned positions where the tower has them."""
        return self._embed_tiles(pixels, cfg) if cfg.tile_size is not None else self.patch_embed(pixels)

    def _embed_tiles(
        self, pixels: Float[Tensor, "tile channel height width"], cfg: VisionConfig
    ) -> Float[Tensor, "patch d_model"]:
        size = cfg.patch_size
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
        self, patches: Float[Tensor, "patch d_model"], grids: tuple[Grid, ...], cfg: VisionConfig, run: PatchRun
    ) -> Float[Tensor, "token d_out"]:
        tokens = run.tokens(grids, cfg)
        if cfg.tile_size is None:  # patches come merge block by merge block
            merged = self.ln(patches, run.hook).view(-1, cfg.d_merged)
        else:
            merged = self.ln(_merge_raster(patches, grids, cfg), tokens.hook)
        pre = tokens.hook(self.hook_pre, self.in_proj(merged))
        post = tokens.hook(self.hook_post, ACTIVATIONS["gelu"](pre))
        return self.out_proj(post)


def _merge_raster(
    patches: Float[Tensor, "patch d_model"], grids: tuple[Grid, ...], cfg: VisionConfig
) -> Float[Tensor, "token d_merged"]:
    """Pixel shuffle: class tokens dropped, the patches of every merge block side by side, row by row."""
    (_, rows, cols), m = grids[0], cfg.merge_size
    tiles = patches.view(-1, 1 + rows * cols, cfg.d_model)[:, 1:]
    blocks = tiles.reshape(-1, rows // m, m, cols // m, m, cfg.d_model).transpose(2, 3)
    if cfg.transposed_tokens:
        blocks = blocks.transpose(1, 2)
    return blocks.reshape(-1, cfg.d_merged)


@lru_cache(maxsize=256)
def _rows_cols(grid: Grid, merge: int) -> Int[Tensor, "patch 2"]:
    """Row and column of every patch, merge block by merge block, for each temporal slice."""
    t, h, w = grid
    rows, cols = np.indices((h, w))
    blocks = (h // merge, merge, w // merge, merge)
    in_order = [axis.reshape(blocks).transpose(0, 2, 1, 3).ravel() for axis in (rows, cols)]
    return torch.from_numpy(np.tile(np.stack(in_order, axis=-1), (t, 1)))
