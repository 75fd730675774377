"""The vision tower and the projector.

Linear work runs on packed patches, [patch, ...] of all images one after the other. Hooks and attention
see them as [image, patch, ...], padded with zeros at the end to the longest image; where all images
have one size that is a view of the same memory. A video counts as one image for each of its temporal
patches (two frames), because attention never crosses them.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.attention import Attention, AttentionMask, AttentionRun, attend
from hooked_vlm.components import ACTIVATIONS, Norm
from hooked_vlm.config import VisionConfig
from hooked_vlm.decoder import vision_blocks
from hooked_vlm.hooks import HookPoint, is_hooked
from hooked_vlm.rotary import patch_rotation
from hooked_vlm.token_layout import Grid


class PatchRun(AttentionRun):
    """A forward pass over packed patches of images with `lengths` patches each."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device, use_attn_result: bool) -> None:
        self.lengths, self.longest = lengths, max(lengths)
        self.slots: Int[Tensor, "patch"] | None = None
        key_valid = None
        if min(lengths) != self.longest:
            valid = np.arange(self.longest) < np.array(lengths)[:, None]
            key_valid = torch.from_numpy(valid).to(device)
            self.slots = torch.from_numpy(np.flatnonzero(valid)).to(device)
        super().__init__(AttentionMask(causal=False, key_valid=key_valid), None, use_attn_result)

    @classmethod
    def of(cls, grids: tuple[Grid, ...], device: torch.device, use_attn_result: bool = False) -> "PatchRun":
        """A pass over the images and videos with these patch grids."""
        lengths = tuple(h * w for t, h, w in grids for _ in range(t))
        return cls(lengths, device, use_attn_result)

    def pad(self, packed: Float[Tensor, "patch *rest"]) -> Float[Tensor, "image longest *rest"]:
        shape = (len(self.lengths), self.longest, *packed.shape[1:])
        if self.slots is None:
            return packed.view(shape)
        flat = packed.new_zeros(shape[0] * shape[1], *shape[2:])
        return flat.index_copy(0, self.slots, packed).view(shape)

    def pack(self, padded: Float[Tensor, "image longest *rest"]) -> Float[Tensor, "patch *rest"]:
        flat = padded.flatten(0, 1)
        return flat if self.slots is None else flat[self.slots]

    def hook(self, point: HookPoint, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.pack(point(self.pad(x))) if is_hooked(point) else x

    def attend(self, attn: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.pad(q), self.pad(k), self.pad(v)
        return self.pack(attend(q, k, v, self.mask, attn.hook_attn_scores, attn.hook_pattern))

    def merged(self, patches_per_token: int) -> "PatchRun":
        """The same images after `patches_per_token` patches became one token."""
        lengths = tuple(n // patches_per_token for n in self.lengths)
        return PatchRun(lengths, self._device, self.use_attn_result)

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.slots is None else self.slots.device


class PatchEmbed(nn.Module):
    """A linear map of flattened patches (a convolution whose stride is its kernel)."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(cfg.d_patch, cfg.d_model, bias=False)

    def forward(self, pixels: Float[Tensor, "patch d_patch"]) -> Float[Tensor, "patch d_model"]:
        return self.proj(pixels.to(self.proj.weight.dtype))


class VisionTower(nn.Module):
    """Qwen2-VL's vision transformer: no class token, no absolute positions, no final norm."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(cfg)
        self.hook_embed = HookPoint()  # [image, patch, d_model]
        self.blocks = vision_blocks(cfg)

    def forward(
        self,
        pixels: Float[Tensor, "patch d_patch"],
        grids: tuple[Grid, ...],
        cfg: VisionConfig,
        run: PatchRun,
    ) -> Float[Tensor, "patch d_model"]:
        """`pixels` in the checkpoint's patch order (merge block by merge block), image after image."""
        resid = run.hook(self.hook_embed, self.patch_embed(pixels))
        rows_cols = torch.cat([_rows_cols(grid, cfg.merge_size) for grid in grids])
        rotate = patch_rotation(rows_cols.to(pixels.device), cfg.d_head, cfg.rope_theta)
        for layer, block in enumerate(self.blocks):
            resid = block(resid, rotate, run, layer)
        return resid


class Projector(nn.Module):
    """Qwen2-VL's patch merger: norm, the patches of a merge block side by side, a two-layer MLP."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.patches_per_token = cfg.merge_size**2
        width = cfg.d_model * self.patches_per_token
        self.ln = Norm(cfg.d_model, cfg.eps, centered=True)
        self.in_proj = nn.Linear(width, width)
        self.hook_pre = HookPoint()  # [image, token, d_model * patches per token]
        self.hook_post = HookPoint()  # [image, token, d_model * patches per token]
        self.out_proj = nn.Linear(width, cfg.d_out)

    def forward(self, patches: Float[Tensor, "patch d_model"], run: PatchRun) -> Float[Tensor, "token d_out"]:
        normalized = self.ln(patches, run.hook)
        tokens = run.merged(self.patches_per_token)
        pre = tokens.hook(self.hook_pre, self.in_proj(normalized.view(-1, self.in_proj.in_features)))
        post = tokens.hook(self.hook_post, ACTIVATIONS["gelu"](pre))
        return self.out_proj(post)


@lru_cache(maxsize=256)
def _rows_cols(grid: Grid, merge: int) -> Int[Tensor, "patch 2"]:
    """Row and column of every patch, merge block by merge block, for each temporal slice."""
    t, h, w = grid
    rows, cols = np.indices((h, w))
    blocks = (h // merge, merge, w // merge, merge)
    in_order = [axis.reshape(blocks).transpose(0, 2, 1, 3).ravel() for axis in (rows, cols)]
    return torch.from_numpy(np.tile(np.stack(in_order, axis=-1), (t, 1)))
