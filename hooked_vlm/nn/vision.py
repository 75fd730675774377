"""The vision tower and the projector, each made of the parts that `VisionConfig` names.

A video counts as one image for each of its temporal patches (two frames), and a tiled image as one for each of its
tiles, because attention never crosses them. Images of different sizes are packed (`hooked_vlm.nn.packing`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.config import VisionConfig
from hooked_vlm.errors import InputError
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

    patches, patch_rows = over([cfg.class_token + n for n in seen], rotate)
    if cfg.window is not None:
        patches = _in_windows(patches, cfg, grids)
    tokens, token_rows = over([n // model.projector.token_size**2 for n in seen], None)
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
        self.proj = nn.Linear(cfg.d_patch, cfg.d_model, bias=cfg.patch_bias)

    def forward(self, pixels: Float[Tensor, "patch d_patch"]) -> Float[Tensor, "patch d_model"]:
        return self.proj(pixels.to(next(self.parameters()).dtype))


class TileEmbed(nn.Module):
    """Class token and learned positions of a picture's patches, each where the tower has them."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.class_token:
            self.class_token = nn.Parameter(torch.empty(1, 1, cfg.d_model))
        if cfg.n_positions:
            self.positions = nn.Parameter(torch.empty(1, cfg.class_token + cfg.n_positions, cfg.d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, patches: Float[Tensor, "patch d_model"], grids: Sequence[Grid]) -> Float[Tensor, "seq d_model"]:
        """`patches` are those of all pictures, one picture after the other; so is what comes out."""
        sizes = [(h, w) for t, h, w in grids for _ in range(t)]
        runs = [(size, len(list(run))) for size, run in groupby(sizes)]  # pictures of one size in a row
        parts = []
        for ((rows, cols), n), own in zip(runs, patches.split([h * w * n for (h, w), n in runs]), strict=True):
            pictures = own.unflatten(0, (n, rows * cols))
            if self.cfg.n_positions:
                pictures = pictures + self.positions_for(rows, cols)
            if self.cfg.class_token:
                class_token = self.class_token
                if self.cfg.n_positions:
                    class_token = class_token + self.positions[:, :1]
                pictures = torch.cat((class_token.expand(n, -1, -1), pictures), dim=1)
            parts.append(pictures.flatten(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def positions_for(self, rows: int, cols: int) -> Float[Tensor, "1 patch d_model"]:
        """The learned positions of patches, fitted to a picture of `rows` x `cols`, in the order of its patches."""
        cfg, learned = self.cfg, self.positions[:, int(self.cfg.class_token) :]
        side = isqrt(cfg.n_positions)
        if (rows, cols) != (side, side):
            learned = self._resized(learned, side, (rows, cols))
        if cfg.patch_order == "raster":
            return learned
        rows_cols = _rows_cols((1, rows, cols), cfg.merge_size).to(learned.device)
        return learned[:, rows_cols[:, 0] * cols + rows_cols[:, 1]]

    def _resized(
        self, learned: Float[Tensor, "1 place d_model"], side: int, size: tuple[int, int]
    ) -> Float[Tensor, "1 patch d_model"]:
        if self.cfg.position_fit == "table":
            raise InputError(
                f"this vision tower has positions for {side} x {side} patches, got a picture of {size[0]} x {size[1]}: "
                f"prepare it with the model's image processor, {side * self.cfg.patch_size} pixels high and wide"
            )
        full = learned.to(torch.promote_types(learned.dtype, torch.float32))
        square = full.view(1, side, side, -1).permute(0, 3, 1, 2)
        corners = self.cfg.position_fit == "bilinear"
        resized = F.interpolate(square, size=size, mode=self.cfg.position_fit, align_corners=corners)
        return resized.flatten(2).transpose(1, 2).to(learned.dtype)


class UnreadNorm(nn.Module):
    """The weights of a norm that a checkpoint has behind its last block and nothing reads."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(cfg.d_model))
        self.bias = nn.Parameter(torch.zeros(cfg.d_model))


class VisionTower(nn.Module):
    """A pre-norm transformer over patches."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.n_layers_run = cfg.n_layers_run
        centered = cfg.normalization_type == "LN"
        self.patch_embed = PatchEmbed(cfg)
        self.tile_embed = TileEmbed(cfg) if cfg.class_token or cfg.n_positions else None
        self.hook_embed = HookPoint()  # [image, patch, d_model]
        self.ln_pre = Norm(cfg.d_model, cfg.eps, centered) if cfg.pre_norm else None
        self.blocks = vision_blocks(cfg)
        self.ln_post = Norm(cfg.d_model, cfg.eps, centered) if cfg.post_norm else None
        self.unread_norm = UnreadNorm(cfg) if cfg.unread_norm else None

    def forward(
        self,
        pixels: Float[Tensor, "all_patches d_patch"] | Float[Tensor, "picture channel height width"],
        grids: tuple[Grid, ...],
        here: ImagePass,
    ) -> Float[Tensor, "*image patch d_model"]:
        """What the projector reads. `pixels` are as the checkpoint's image processor makes them, image after image."""
        with running(here.patches):
            return self.normed(self.run(self.embed(pixels, grids, here), here), here)

    def embed(
        self,
        pixels: Float[Tensor, "all_patches d_patch"] | Float[Tensor, "picture channel height width"],
        grids: tuple[Grid, ...],
        here: ImagePass,
    ) -> Float[Tensor, "*image patch d_model"]:
        """Patch embeddings, with class tokens and learned positions where the tower has them, before `hook_embed`."""
        patches = _cut(pixels, self.cfg.patch_size) if self.cfg.patch_order == "raster" else pixels
        embedded = self.patch_embed(patches)
        return here.by_image(embedded if self.tile_embed is None else self.tile_embed(embedded, grids))

    def run(
        self, stream: Float[Tensor, "*image patch d_model"], here: ImagePass, first: int = -1, stop: int | None = None
    ) -> Float[Tensor, "*image patch d_model"]:
        """The stream through `hook_embed` and `ln_pre` (-1) and the blocks that are read, or some of these steps in a
        row."""
        stop = self.n_layers_run if stop is None else stop
        with running(here.patches):
            if first < 0 <= stop:
                stream = self.hook_embed(stream)  # [image, patch, d_model]
                stream = stream if self.ln_pre is None else self.ln_pre(stream)
            return run_blocks(self.blocks, stream, max(first, 0), max(stop, 0))

    def normed(
        self, stream: Float[Tensor, "*image patch d_model"], here: ImagePass
    ) -> Float[Tensor, "*image patch d_model"]:
        """The stream behind the last block, through `ln_post` where the tower has it: what the projector reads."""
        if self.ln_post is None:
            return stream
        with running(here.patches):
            return self.ln_post(stream)


def _cut(pictures: Float[Tensor, "picture channel height width"], size: int) -> Float[Tensor, "patch d_patch"]:
    """The flattened patches of square pictures, row by row; a rest of pixels at the right and at the bottom is lost."""
    patches = pictures.unfold(2, size, size).unfold(3, size, size)  # picture channel row col y x
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)


class Projector(nn.Module):
    """Image tokens from patches, in the steps that the configuration names."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.cfg, self.norm_of, self.token_size = cfg, cfg.norm_of, cfg.token_size
        hidden = cfg.d_merged if cfg.d_projector is None else cfg.d_projector
        if self.norm_of is not None:
            width = cfg.d_model if self.norm_of == "patches" else cfg.d_merged
            self.ln = Norm(width, cfg.projector_eps, centered=cfg.projector_norm_type == "LN")
        if "activation" in cfg.projector:
            self.in_proj = nn.Linear(cfg.d_merged, hidden, bias=cfg.projector_bias)
            self.hook_pre = HookPoint()  # [image, token, d_projector]
            self.hook_post = HookPoint()  # [image, token, d_projector]
        self.out_proj = nn.Linear(hidden, cfg.d_out, bias=cfg.projector_bias)
        if cfg.line_break:
            self.line_break = nn.Parameter(torch.empty(cfg.d_out))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)

    def forward(
        self, patches: Float[Tensor, "*image patch d_model"], grids: tuple[Grid, ...], here: ImagePass
    ) -> Float[Tensor, "all_tokens d_out"]:
        """The features of all images' tokens, one image after the other."""
        cfg = self.cfg
        if self.norm_of == "patches":
            with running(here.patches):
                patches = self.ln(patches)
        tokens = self._tokens(_without_class_tokens(patches, here) if cfg.class_token else patches, grids[0])
        with running(here.tokens):
            if self.norm_of == "tokens":
                tokens = self.ln(tokens)
            if "activation" in cfg.projector:
                pre = self.hook_pre(self.in_proj(tokens))  # [image, token, d_projector]
                tokens = self.hook_post(ACTIVATIONS["gelu"](pre))  # [image, token, d_projector]
            return here.in_a_row(self.out_proj(tokens))

    def arrange(
        self, outputs: Float[Tensor, "all_outputs d_out"], inputs: VLMInputs, n_runs: int = 1
    ) -> Float[Tensor, "all_tokens d_out"]:
        """Image tokens from the projector's outputs of `n_runs` runs over the inputs: in the order that layouts say,
        with line breaks; resampled grids as the mixes of outputs that they are."""
        if inputs.feature_sources is None:
            return outputs
        sources, shares = inputs.feature_sources
        sources = sources.to(outputs.device)
        own = outputs.unflatten(0, (n_runs, -1))
        if self.cfg.line_break:
            own = torch.cat((own, self.line_break.to(own).expand(n_runs, 1, -1)), dim=1)
        if shares is None:
            return own[:, sources[:, 0]].flatten(0, 1)
        exact = torch.promote_types(own.dtype, torch.float32)  # mixed as torch does: rounded once
        weights = shares.to(own.device, exact)[:, :, None]  # [token, source, 1]
        tokens = own[:, sources[:, 0]].to(exact) * weights[:, 0]
        for i in range(1, sources.shape[1]):
            tokens = tokens + own[:, sources[:, i]].to(exact) * weights[:, i]
        return tokens.to(own.dtype).flatten(0, 1)

    def _tokens(
        self, patches: Float[Tensor, "*image patch d_model"], grid: Grid
    ) -> Float[Tensor, "*image token d_merged"]:
        """The patches of each token side by side, or their mean. `grid` is that of all pictures in raster order."""
        cfg = self.cfg
        if "pool" in cfg.projector:
            return _pool_raster(patches, grid, cfg)
        if "merge" not in cfg.projector:
            return patches
        return _merge_raster(patches, grid, cfg) if cfg.patch_order == "raster" else _side_by_side(patches, cfg)


def _without_class_tokens(
    patches: Float[Tensor, "*image seq d_model"], here: ImagePass
) -> Float[Tensor, "*image patch d_model"]:
    if here.patches.packing is None:
        return patches[:, 1:]
    return torch.cat([image[1:] for image in patches.split(here.patches.packing.lengths)])


def _side_by_side(
    patches: Float[Tensor, "*image patch d_model"], cfg: VisionConfig
) -> Float[Tensor, "*image token d_merged"]:
    """The patches of merge blocks, that come block by block."""
    return patches.reshape(*patches.shape[:-2], patches.shape[-2] // cfg.merge_size**2, -1)


def _merge_raster(
    patches: Float[Tensor, "picture patch d_model"], grid: Grid, cfg: VisionConfig
) -> Float[Tensor, "picture token d_merged"]:
    """Pixel shuffle: the patches of every merge block side by side, row by row."""
    (_, rows, cols), m = grid, cfg.merge_size
    blocks = patches.reshape(-1, rows // m, m, cols // m, m, patches.shape[-1]).transpose(2, 3)
    if cfg.transposed_tokens:
        blocks = blocks.transpose(1, 2)
    return blocks.reshape(len(patches), rows * cols // m**2, -1)


def _pool_raster(
    patches: Float[Tensor, "picture patch d_model"], grid: Grid, cfg: VisionConfig
) -> Float[Tensor, "picture token d_model"]:
    """The means of blocks of patches, row by row."""
    pictures = patches.unflatten(1, grid[1:]).permute(0, 3, 1, 2)  # picture d_model row col
    return F.avg_pool2d(pictures, cfg.pool_size).flatten(2).transpose(1, 2)


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
    seen = model.vision(torch.cat(pixels), inputs.grids, images)
    return model.projector.arrange(model.projector(seen, inputs.grids, images), inputs)
