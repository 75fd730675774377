"""The arithmetic of the language model written out in plain torch, from its configuration and weights alone."""

from typing import Any

import torch
from torch import Tensor


def normed(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * factor(norm)


def factor(norm: Any) -> Tensor:
    """What a norm multiplies by: its weight, or 1 + its weight."""
    return 1 + norm.weight if norm.offset else norm.weight


def capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def unembedded(model: Any, x: Tensor) -> Tensor:
    """Logits from the normalised stream."""
    return capped(x @ model.W_U, model.cfg.output_logits_soft_cap)


def scores(cfg: Any, q: Tensor, k: Tensor) -> Tensor:
    """Scores of one query [d_head] and keys [key, d_head]."""
    divisor = cfg.d_head**0.5 if cfg.attn_scale is None else cfg.attn_scale
    return capped(k @ q / divisor, cfg.attn_scores_soft_cap)


def sees(cfg: Any, inputs: Any, row: int, layer: int, query: int, key: int) -> bool:
    """Whether a token sees another, both real."""
    prompt = inputs.stop[row] - inputs.n_generated[row]
    pictures = [run for v in inputs.visuals if v.row == row for run in v.runs]
    blocks = {None: [], "image": pictures, "prompt": [(0, prompt)]}[cfg.bidirectional]
    together = any(start <= query < stop and start <= key < stop for start, stop in blocks)
    window = cfg.kind_of(layer).window
    near = window is None or key > query - window
    if cfg.window_cuts_blocks:
        return (key <= query or together) and near
    return (key <= query and near) or together


def keys_seen(model: Any, inputs: Any, row: int, layer: int, query: int) -> Tensor:
    """Mask over all positions of the real keys that a query sees."""
    real = range(inputs.first[row], inputs.stop[row])
    own = [key in real and sees(model.cfg, inputs, row, layer, query, key) for key in range(inputs.shape[1])]
    return torch.tensor(own)


def head_output(model: Any, cache: Any, layer: int, head: int, z: Tensor | None = None) -> Tensor:
    """What a head adds to the stream [batch, pos, d_model]: z W_O (`z`, or that of the run), through the norm behind
    attention with the run's denominator."""
    block = model.blocks[layer]
    written = (cache["z", layer][:, :, head] if z is None else z) @ block.attn.W_O[head]
    if not model.cfg.use_normalization_before_and_after:
        return written
    whole = torch.einsum("bphd,hdm->bpm", cache["z", layer], block.attn.W_O)
    return written * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + model.cfg.eps) * factor(block.ln1_post)
