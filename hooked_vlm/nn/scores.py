"""Scores, patterns and z written out: what is computed where a fused kernel does not serve."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vlm.nn.masks import AttentionMask

AT_ONCE = 2**24
"""Scores written out at a time where no fused kernel makes them and nobody looks at them (64 MiB of float32)."""


@dataclass(frozen=True)
class Scoring:
    """How queries and keys make scores."""

    divisor: float | None = None
    """What q k^T is divided by; None: sqrt(d_head)."""
    soft_cap: float | None = None
    """Scores s become cap * tanh(s / cap); None: they stay. No fused kernel knows it."""

    def scale(self, d_head: int) -> float:
        """What q k^T is multiplied by."""
        return d_head**-0.5 if self.divisor is None else 1 / self.divisor


PLAIN = Scoring()


def masked_scores(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    mask: AttentionMask,
    scoring: Scoring = PLAIN,
    positions: Int[Tensor, "#batch query"] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """Scores, -inf where a query does not see a key.

    `positions` are those of the queries among the keys; by default the last ones.
    """
    n_queries, n_keys = q.shape[1], k.shape[1]
    seen = mask.dense(n_queries, n_keys, q.device) if positions is None else mask.visible(positions, n_keys)
    return attention_scores(q, k, scoring).masked_fill(~seen, -torch.inf)


def attention_scores(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    scoring: Scoring = PLAIN,
) -> Float[Tensor, "batch head query key"]:
    """Unmasked scores: q k^T / sqrt(d_head), or as the model's `Scoring` says."""
    if scoring.soft_cap is not None:
        return _capped(q, k, scoring, scoring.soft_cap) * scoring.soft_cap
    scale = scoring.scale(q.shape[-1])
    before, after = (scale, 1.0) if q.dtype == torch.float16 else (1.0, scale)  # float16 ends at 65504
    scores = _by_group(q.transpose(1, 2) * before, k.shape[2]) @ k.permute(0, 2, 3, 1)
    return scores.view(q.shape[0], q.shape[2], q.shape[1], k.shape[1]) * after


def _capped(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    scoring: Scoring,
    cap: float,
) -> Float[Tensor, "batch head query key"]:
    """tanh(score / cap); the product with the scale over the cap is one pass, and so is the tanh, in place."""
    rows, n_keys, n_groups = k.shape[:3]
    queries = _by_group(q.transpose(1, 2), n_groups).flatten(0, 1)
    keys = k.permute(0, 2, 3, 1).flatten(0, 1)
    products = torch.baddbmm(q.new_zeros(()), queries, keys, beta=0, alpha=scoring.scale(q.shape[-1]) / cap)
    return products.tanh_().view(rows, q.shape[2], q.shape[1], n_keys)


def attention_pattern(
    scores: Float[Tensor, "batch head query key"],
    valid: Bool[Tensor, "batch query"] | None = None,
    keep_float32: bool = False,
) -> Float[Tensor, "batch head query key"]:
    """Softmax over keys, made in float32 at least and given in the scores' dtype (unless `keep_float32`); zero in rows
    of queries that are not `valid` (padding)."""
    pattern = scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype))
    if not keep_float32:
        pattern = pattern.to(scores.dtype)
    return pattern if valid is None else pattern.masked_fill(~valid[:, None, :, None], 0.0)


def weighted_values(
    pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch key kv_head d_head"]
) -> Float[Tensor, "batch query head d_head"]:
    """Values averaged by a pattern."""
    z = _by_group(pattern, v.shape[2]) @ v.transpose(1, 2)
    return z.view(*pattern.shape[:3], v.shape[-1]).transpose(1, 2)


def _by_group(x: Float[Tensor, "batch head query d"], n_groups: int) -> Float[Tensor, "batch group grouped d"]:
    """The queries of all heads that share keys and values, one after the other."""
    return x.reshape(x.shape[0], n_groups, -1, x.shape[-1])


def written_out_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scoring: Scoring, cap: float
) -> Tensor:
    """z under a mask [batch, 1, query, key], or causal, from scores that are made for some queries at a time.

    The mask, 0 or -inf, and the cap times the tanh are added in one pass.
    """
    rows, n_queries, n_heads, _ = q.shape
    keys = torch.arange(k.shape[1], device=q.device)
    if causal:
        mask = (keys <= torch.arange(n_queries, device=q.device)[:, None])[None, None]
    hidden = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    at_once, parts = max(1, AT_ONCE // (rows * n_heads * len(keys))), []
    for first in range(0, n_queries, at_once):
        at = slice(first, first + at_once)
        if hidden is None:
            scores = _capped(q[:, at], k, scoring, cap) * cap
        else:
            own = hidden if hidden.shape[2] == 1 else hidden[:, :, at]
            scores = torch.add(own, _capped(q[:, at], k, scoring, cap), alpha=cap)
        parts.append(weighted_values(attention_pattern(scores), v))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
