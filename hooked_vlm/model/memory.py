"""Memory that a model needs, computed from the shapes of a model on the meta device.

With s bytes to a number, n tokens and, on the image side, P patches of all images together:

- weights: every parameter once, s each;
- key-value cache: 2 x layers x n x key-value heads x d_head x s;
- activations, the most that is alive at one time in a forward pass that stores nothing: 8 (n + 1) for positions, and
  whichever of three is largest: the MLP of a language block, n (5 d_model + 4 d_mlp + 2 d_head) s; that of a vision
  block, P ((5 d_model + k d_mlp) s + 4 (d_patch + 2 d_head)) + n (d_model + 2 d_head) s with k = 2 (3 for
  quick_gelu, 4 with a gate; pixels and angles are float32), and P d_model s for each block that DeepStack reads; the
  logits, n (2 d_model + d_vocab) s. Where scores have a soft cap, which no fused kernel knows, also the attention of a
  language block, n (2 d_model + 3 (heads + key-value heads) d_head) s + n^2 (s + 1) for masks + s + 8 (2 s in float32)
  for each of its heads x n x n scores, of which at most 2^24 are alive at a time;
- full cache, what `run_with_cache` stores by default: the hook table with numbers for its axes, without
  `hook_resid_pre` (and `hook_attn_out` and `hook_mlp_out` behind norms), which are the tensor of the hook point before;
- gradients, for `run_with_cache(..., incl_bwd=True)`: one for every weight and for every number of the full cache;
  hook points left out there, of which hooks then get copies, with their gradients; and under a soft cap what backward
  needs of every layer's heads x n x n scores, 2 s + 4 each (2 s in float32).

Workspaces of kernels and what CUDA takes for itself are not in it: `n_gpus` leaves a tenth of each GPU free.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hooked_vlm.config import VLMConfig
from hooked_vlm.model.hook_catalogue import HookRow, hook_table
from hooked_vlm.model.hook_shapes import PromptSize, filled, layers_of
from hooked_vlm.nn.hooks import is_encoder, is_quadratic
from hooked_vlm.nn.scores import AT_ONCE

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

USABLE_SHARE = 0.9
"""Of a GPU; the rest is CUDA's own and the allocator's."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes for one prompt in one dtype; the module says how they come about."""

    weights: int
    kv_cache: int
    activations: int
    full_cache: int
    gradients: int

    def total(self, full_cache: bool = False, gradients: bool = False) -> int:
        """Bytes of a forward pass with a key-value cache; of one that stores all activations; and backward."""
        plain = self.weights + self.kv_cache + self.activations
        return plain + (self.full_cache if full_cache or gradients else 0) + (self.gradients if gradients else 0)


def memory_plan(model: "HookedVLM", prompt: PromptSize, dtype: torch.dtype) -> MemoryPlan:
    """Memory of a forward pass over one prompt; `model` may be on the meta device."""
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    stored = sum(_cached_bytes(row, model, prompt, dtype) for row in cached_rows(model))
    copies = sum(_cached_bytes(row, model, prompt, dtype) for row in cached_rows(model) if _is_shared(row, model))
    scores = model.cfg.n_layers * _kept_score_bytes(model, prompt, dtype)
    full_cache = stored - copies
    return MemoryPlan(
        weights=weights,
        kv_cache=_kv_bytes(model, prompt.n_tokens, dtype),
        activations=_activation_bytes(model, prompt, dtype),
        full_cache=full_cache,
        gradients=weights + full_cache + 2 * copies + scores,
    )


def cached_rows(model: "HookedVLM") -> list[HookRow]:
    """The hook points that `run_with_cache` stores by default."""
    return [row for row in hook_table(model) if row.fires.startswith("once") and not is_quadratic(row.name)]


def _cached_bytes(row: HookRow, model: "HookedVLM", prompt: PromptSize, dtype: torch.dtype) -> int:
    """Bytes in all layers together. Denominators of norms are float32 at least, and so is what some multiply."""
    in_float32 = row.name.endswith("hook_scale") or (row.name.endswith("hook_normalized") and _rounds_last(row, model))
    stored = torch.promote_types(dtype, torch.float32) if in_float32 else dtype
    shape = [int(size) for size in filled(row, model.cfg, prompt)]
    return math.prod(shape) * layers_of(row, model.cfg) * stored.itemsize


def _is_shared(row: HookRow, model: "HookedVLM") -> bool:
    """Whether a hook point's tensor is that of the point before it: the stream that enters a block, or what a norm
    behind attention or MLP gives."""
    behind_norms = model.cfg.use_normalization_before_and_after and not is_encoder(row.name)
    return row.name.endswith("hook_resid_pre") or (
        behind_norms and row.name.endswith((".hook_attn_out", ".hook_mlp_out"))
    )


def _rounds_last(row: HookRow, model: "HookedVLM") -> bool:
    """Whether a hook point's norm multiplies in float32: a LayerNorm, or an RMSNorm whose weights are offsets."""
    vision = model.cfg.vision
    if vision is None or not is_encoder(row.name):
        return model.cfg.rmsnorm_uses_offset
    if row.name.startswith("projector."):
        return vision.projector_norm_type == "LN" or vision.projector_norm_offset
    return vision.normalization_type == "LN"


def _kept_score_bytes(model: "HookedVLM", prompt: PromptSize, dtype: torch.dtype) -> int:
    """Bytes of a layer's scores that backward needs, where attention is written out: tanh and softmax, and the pattern
    where it is rounded."""
    if model.cfg.attn_scores_soft_cap is None:
        return 0
    rounded = dtype.itemsize < 4
    return model.cfg.n_heads * prompt.n_tokens**2 * (2 * dtype.itemsize + (4 if rounded else 0))


def _kv_bytes(model: "HookedVLM", n_tokens: int, dtype: torch.dtype) -> int:
    cfg = model.cfg
    return 2 * cfg.n_layers * n_tokens * cfg.n_key_value_heads * cfg.d_head * dtype.itemsize


def _activation_bytes(model: "HookedVLM", prompt: PromptSize, dtype: torch.dtype) -> int:
    cfg, vision, n = model.cfg, model.cfg.vision, prompt.n_tokens
    positions = 8 * (n + 1)
    block = n * (5 * cfg.d_model + 4 * cfg.d_mlp + 2 * cfg.d_head) * dtype.itemsize
    logits = n * (2 * cfg.d_model + cfg.d_vocab) * dtype.itemsize
    if cfg.attn_scores_soft_cap is not None:
        width = 2 * cfg.d_model + 3 * (cfg.n_heads + cfg.n_key_value_heads) * cfg.d_head
        of_score = dtype.itemsize + (8 if dtype.itemsize < 4 else dtype.itemsize)  # the softmax is in float32 at least
        scores = _written_out_scores(cfg, n) * of_score
        block = max(block, n * width * dtype.itemsize + n**2 * (dtype.itemsize + 1) + scores)
    if vision is None or not prompt.n_images:
        return positions + max(block, logits)
    wide = 4 if vision.gated_mlp else 3 if vision.act_fn == "quick_gelu" else 2
    per_patch = (5 * vision.d_model + wide * vision.d_mlp) * dtype.itemsize + 4 * (vision.d_patch + 2 * vision.d_head)
    # the tokens' embeddings and rotations, and patches that DeepStack reads
    waiting = n * (cfg.d_model + 2 * cfg.d_head) * dtype.itemsize
    waiting += cfg.n_deepstack * prompt.n_images * prompt.n_patches * vision.d_model * dtype.itemsize
    tower = prompt.n_images * prompt.n_patches * per_patch + waiting
    return positions + max(block, logits, tower)


def _written_out_scores(cfg: VLMConfig, n: int) -> int:
    """Number of scores alive at a time where no fused kernel makes them."""
    return cfg.n_heads * n * min(n, max(1, AT_ONCE // (cfg.n_heads * n)))


# ---------------------------------------------------------------- several GPUs


def n_gpus(
    model: "HookedVLM",
    prompt: PromptSize,
    dtype: torch.dtype,
    gpu_bytes: int,
    full_cache: bool = False,
    gradients: bool = False,
) -> int | None:
    """Number of GPUs of one size that hold the model, layer after layer, and one prompt; None if no number does.

    A layer with its share of the caches stays on one GPU; each GPU has room for the activations of a pass besides.
    """
    room = int(USABLE_SHARE * gpu_bytes) - _activation_bytes(model, prompt, dtype)
    return _filled_in_order(_layer_bytes(model, prompt, dtype, full_cache, gradients), room)


def _layer_bytes(
    model: "HookedVLM", prompt: PromptSize, dtype: torch.dtype, full_cache: bool, gradients: bool
) -> list[int]:
    """Bytes kept for each block and for each part around them, in the order of the forward pass."""
    parts: dict[str, int] = {}
    copies = 2 if gradients else 1
    for name, parameter in model.named_parameters():
        part = _part(name)
        parts[part] = parts.get(part, 0) + copies * parameter.numel() * dtype.itemsize
    for layer in range(model.cfg.n_layers):
        parts[f"blocks.{layer}"] += _kv_bytes(model, prompt.n_tokens, dtype) // model.cfg.n_layers
        parts[f"blocks.{layer}"] += _kept_score_bytes(model, prompt, dtype) if gradients else 0
    stored = [row for row in cached_rows(model) if gradients or (full_cache and not _is_shared(row, model))]
    for row in stored:
        n_layers = layers_of(row, model.cfg)
        for layer in range(n_layers):
            part = _part(row.name.replace("{l}", str(layer)))
            parts[part] = parts.get(part, 0) + copies * _cached_bytes(row, model, prompt, dtype) // n_layers
    return [parts[part] for part in sorted(parts, key=_order)]


def _part(name: str) -> str:
    """The block, or the part of the model outside the blocks, that a parameter or hook point belongs to."""
    words = name.removeprefix("vision.").split(".")
    part = ".".join(words[:2]) if words[0] == "blocks" else words[0]
    return f"vision.{part}" if name.startswith("vision.") else part


def _order(part: str) -> tuple[int, int]:
    """Tower, projector, embedding, blocks, and what follows them."""
    layer = int(part.rsplit(".", 1)[1]) if "blocks." in part else -1
    if part == "vision.ln_post":
        return (1, -2)
    if part.startswith("vision."):
        return (0, layer)
    if part.startswith("blocks."):
        return (3, layer)
    return ({"projector": 1, "hook_image_features": 1, "embed": 2, "hook_embed": 2}.get(part, 4), layer)


def _filled_in_order(sizes: Sequence[int], room: int) -> int | None:
    """Boxes of `room` for things that keep their order; None if one of them does not fit into any."""
    if max(sizes) > room:
        return None
    boxes, left = 1, room
    for size in sizes:
        if size > left:
            boxes, left = boxes + 1, room
        left -= size
    return boxes
