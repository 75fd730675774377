"""The vision tower and the projector, each made of the parts that `VisionConfig` names.

A video counts as one image for each of its temporal patches (two frames), and a tiled image as one for each of its
tiles, because attention never crosses them. Images of different sizes are packed (`hooked_vlm.nn.packing`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.inputs.token_layout import Grid
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.block import run_blocks, vision_blocks
from hooked_vlm.nn.components import ACTIVATIONS, Norm, PatchEmbed, TileEmbed, UnreadNorm
from hooked_vlm.nn.forward_pass import ForwardPass, Recorder
from hooked_vlm.nn.hooks import HookPoint, is_encoder, is_hooked, running, shows_modules
from hooked_vlm.nn.masks import AttentionMask
from hooked_vlm.nn.packing import Packing, Windows, window_numbers
from hooked_vlm.nn.rotary import Rotation, Rotations, patch_places, patch_rotation
from hooked_vlm.nn.weight_access import values_of
from hooked_vlm.vision_config import ProjectorStep, VisionConfig

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
    inner: dict[int, Float[Tensor, "*image patch d_model"]] = field(default_factory=dict)
    """Patches as they left the blocks that DeepStack reads, put here as these run."""

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
        places = torch.cat([patch_places(grid, cfg.merge_size) for grid in grids])
        rotate = patch_rotation(places.to(device), cfg.d_head, cfg.rope_theta)

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
    slices = [window_numbers((1, *grid[1:]), cfg.merge_size, cfg.window) for grid in grids for _ in range(grid[0])]
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
            at, stop = max(first, 0), max(stop, 0)
            for layer in self.cfg.deepstack_layers:
                if at <= layer < stop:
                    stream, at = run_blocks(self.blocks, stream, at, layer + 1), layer + 1
                    here.inner[layer] = stream
            return run_blocks(self.blocks, stream, at, stop)

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


DEEPSTACK: tuple[ProjectorStep, ...] = ("merge", "norm", "linear", "activation", "linear")
"""The steps of the projectors of inner blocks."""


class Projector(nn.Module):
    """Image tokens from patches, in the steps that the configuration names.

    With DeepStack a token has several features: the projector's own, and one for each inner block that is read, from
    projectors of their own.
    """

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.cfg, self.norm_of, self.token_size = cfg, cfg.norm_of, cfg.token_size
        hidden = cfg.d_merged if cfg.d_projector is None else cfg.d_projector
        if self.norm_of is not None:
            width = cfg.d_model if self.norm_of == "patches" else cfg.d_merged
            centered, offset = cfg.projector_norm_type == "LN", cfg.projector_norm_offset
            self.ln = Norm(width, cfg.projector_eps, centered, offset)
        if "activation" in cfg.projector:
            self.in_proj = nn.Linear(cfg.d_merged, hidden, bias=cfg.projector_bias)
            self.hook_pre = HookPoint()  # [image, token, d_projector]
            self.hook_post = HookPoint()  # [image, token, d_projector]
        self.out_proj = nn.Linear(hidden, cfg.d_out, bias=cfg.projector_bias)
        if cfg.line_break:
            self.line_break = nn.Parameter(torch.empty(cfg.d_out))
            self.reset_parameters()
        if cfg.deepstack_layers:
            inner = replace(cfg, projector=DEEPSTACK, deepstack_layers=())
            self.deepstack = nn.ModuleList(Projector(inner) for _ in cfg.deepstack_layers)

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)

    def forward(
        self, patches: Float[Tensor, "*image patch d_model"], grids: tuple[Grid, ...], here: ImagePass
    ) -> Float[Tensor, "all_tokens *feature d_out"]:
        """The features of all images' tokens, one image after the other; with DeepStack several of each token."""
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
            outputs = here.in_a_row(self.out_proj(tokens))
        if not cfg.deepstack_layers:
            return outputs
        read = zip(self.deepstack, cfg.deepstack_layers, strict=True)
        inner = [own(here.inner[layer].to(patches.device), grids, here).to(outputs) for own, layer in read]
        return torch.stack((outputs, *inner), dim=1)

    def arrange(
        self, outputs: Float[Tensor, "all_outputs *feature d_out"], inputs: VLMInputs, n_runs: int = 1
    ) -> Float[Tensor, "all_tokens *feature d_out"]:
        """Image tokens from the projector's outputs of `n_runs` runs over the inputs: in the order that layouts say,
        with line breaks; resampled grids as the mixes of outputs that they are."""
        if inputs.feature_sources is None:
            return outputs
        sources, shares = inputs.feature_sources
        sources = sources.to(outputs.device)
        own = outputs.unflatten(0, (n_runs, -1))
        if self.cfg.line_break:
            own = torch.cat((own, values_of(self, "line_break").to(own).expand(n_runs, 1, -1)), dim=1)
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


def encode(
    model: "HookedVLM", inputs: VLMInputs, context: Mapping[str, Any], recorder: Recorder | None
) -> Float[Tensor, "token *feature d_model"]:
    """Run the tower and the projector over the pixels of the inputs: features of images first, then of videos."""
    pixels = [p for p in (inputs.pixel_values, inputs.pixel_values_videos) if p is not None]
    images = image_pass(model, inputs.grids, inputs.device, context, recorder)
    seen = model.vision(torch.cat(pixels), inputs.grids, images)
    return model.projector.arrange(model.projector(seen, inputs.grids, images), inputs)


def image_features(
    model: "HookedVLM", inputs: VLMInputs, here: ForwardPass, like: Tensor
) -> Float[Tensor, "token *feature d_model"]:
    """Image features, encoded now or given with the inputs, with `like`'s dtype and on its device.

    Raises:
        HookError: there are hooks on the image side of inputs whose images are encoded.
    """
    features = inputs.image_features
    if features is None:
        return encode(model, inputs, here.context, here.recorder).to(like)
    hooked = [name for name, point in model.hook_dict.items() if is_encoder(name) and is_hooked(point)]
    model.check_reachable(hooked, inputs, {})
    return features.clone().to(like)  # other passes share them
