"""Attention: the one place where the presence of a hook chooses the arithmetic.

`attend` runs the fused kernel unless that layer's scores or pattern are hooked; only then are the
[query, key] tensors made. The two paths compute the same function (tested in float32 and bfloat16).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooked_vlm.components import AllHeadsNorm, HookFn, WithViews, absent_bias, weight_view
from hooked_vlm.hooks import HookPoint, is_hooked
from hooked_vlm.rotary import Rotation


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which keys a query may see, without ever being a [pos, pos] tensor unless a pattern is hooked.

    The queries are the last `n_queries` of the keys. Real keys of a row are one contiguous run
    (padding at either end or none); `key_valid` is None when nothing is padded.
    """

    causal: bool
    key_valid: Bool[Tensor, "batch key"] | None = None
    uncached_left_padding: Int[Tensor, "batch"] | None = None
    """Padding before each row, given where queries and keys are the same positions."""
    window: int | None = None
    """How many keys a query may see at most, itself included (sliding window); None: no limit."""

    def to(self, device: torch.device) -> "AttentionMask":
        valid, padding = self.key_valid, self.uncached_left_padding
        return AttentionMask(
            self.causal,
            None if valid is None else valid.to(device),
            None if padding is None else padding.to(device),
            self.window,
        )

    def limits(self, n_keys: int) -> bool:
        """Whether the window hides any of `n_keys` keys."""
        return self.window is not None and self.window < n_keys

    def query_valid(self, n_queries: int) -> Bool[Tensor, "batch query"] | None:
        return None if self.key_valid is None else self.key_valid[:, -n_queries:]

    def dense(self, n_queries: int, n_keys: int, device: torch.device) -> Bool[Tensor, "#batch 1 query key"]:
        """The mask written out. A padding query sees itself, so that its softmax stays finite."""
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
        if self.causal:
            mask = mask.tril(n_keys - n_queries)
        if self.window is not None:
            mask = mask.triu(n_keys - n_queries - self.window + 1)
        mask = mask[None, None]
        if self.key_valid is not None:
            n_past = n_keys - n_queries
            itself = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_past).triu(n_past)
            mask = (mask & self.key_valid[:, None, None, :]) | itself
        return mask


def attend(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    v: Float[Tensor, "batch key kv_head d_head"],
    mask: AttentionMask,
    hook_attn_scores: HookPoint,
    hook_pattern: HookPoint,
) -> Float[Tensor, "batch query head d_head"]:
    """softmax(q k^T / sqrt(d_head)) v with grouped key-value heads; rows of padding queries are zero."""
    if is_hooked(hook_attn_scores) or is_hooked(hook_pattern):
        z = _explicit(q, k, v, mask, hook_attn_scores, hook_pattern)
    else:
        z = _fused(q, k, v, mask)
    valid = mask.query_valid(q.shape[1])
    return z if valid is None else z * valid[:, :, None, None]


def attention_scores(
    q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key kv_head d_head"]
) -> Float[Tensor, "batch head query key"]:
    """Unmasked scores, q k^T / sqrt(d_head)."""
    q = q.transpose(1, 2)
    k = _per_query_head(k, q.shape[1]).transpose(1, 2)
    return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    hook_attn_scores: HookPoint,
    hook_pattern: HookPoint,
) -> Tensor:
    allowed = mask.dense(q.shape[1], k.shape[1], q.device)
    scores = hook_attn_scores(attention_scores(q, k).masked_fill(~allowed, -torch.inf))
    pattern = scores.softmax(-1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype)
    valid = mask.query_valid(q.shape[1])
    if valid is not None:
        pattern = pattern.masked_fill(~valid[:, None, :, None], 0.0)
    pattern = hook_pattern(pattern)
    return (pattern @ _per_query_head(v, q.shape[2]).transpose(1, 2)).transpose(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    n_queries, n_keys = q.shape[1], k.shape[1]
    if mask.limits(n_keys):
        return _sdpa(q, k, v, mask.dense(n_queries, n_keys, q.device), causal=False)
    padding = mask.uncached_left_padding
    if mask.causal and n_queries == n_keys and padding is not None:
        # Rolling every row to the left puts its padding last, where a causal mask hides it: the fused
        # causal kernel then needs no [pos, pos] mask.
        there = (torch.arange(n_queries, device=q.device) + padding[:, None]) % n_queries
        back = (torch.arange(n_queries, device=q.device) - padding[:, None]) % n_queries
        z = _sdpa(_take(q, there), _take(k, there), _take(v, there), None, causal=True)
        return _take(z, back)
    if mask.causal and n_queries == n_keys:
        # without left padding, keys padded at the end lie in every real query's future
        return _sdpa(q, k, v, None, causal=True)
    if n_queries == 1 or not mask.causal:
        key_mask = None if mask.key_valid is None else mask.key_valid[:, None, None, :]
        return _sdpa(q, k, v, key_mask, causal=False)
    return _sdpa(q, k, v, mask.dense(n_queries, n_keys, q.device), causal=False)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return z.transpose(1, 2)


def _take(x: Tensor, order: Int[Tensor, "batch pos"]) -> Tensor:
    """Positions of `x` [batch, pos, head, d_head] in another order, row by row."""
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _per_query_head(x: Float[Tensor, "batch key kv_head d_head"], n_heads: int) -> Tensor:
    """Keys or values repeated for the query heads that share them."""
    return x if x.shape[2] == n_heads else x.repeat_interleave(n_heads // x.shape[2], dim=2)


class KVCache:
    """Rotated keys and values of the positions run so far, in buffers made once.

    `capacity` is how many positions fit before the buffers must grow (they then double).
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        capacity: int,
        n_key_value_heads: int,
        d_head: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (batch, capacity, n_key_value_heads, d_head)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(n_layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(n_layers)]
        self.length = 0
        """Positions filled, the same for every row (padding included)."""
        self.key_valid: Bool[Tensor, "batch key"] | None = None
        """False where a filled position is padding; None if none is."""
        self.next_position: Int[Tensor, "batch"] | None = None
        """The rotary position of each row's next token (images take up fewer positions than tokens)."""

    @property
    def batch(self) -> int:
        return self.keys[0].shape[0]

    def extend(
        self,
        layer: int,
        k: Float[Tensor, "batch pos kv_head d_head"],
        v: Float[Tensor, "batch pos kv_head d_head"],
    ) -> tuple[Float[Tensor, "batch key kv_head d_head"], Float[Tensor, "batch key kv_head d_head"]]:
        """Write one layer's new keys and values after the filled ones; all of them come back as views.

        `length` moves only with `advance`, so a forward pass that fails half-way leaves the cache as it was.
        """
        end = self.length + k.shape[1]
        for buffers, new in ((self.keys, k), (self.values, v)):
            if end > buffers[layer].shape[1]:
                grown = new.new_empty(new.shape[0], max(end, 2 * self.length), *new.shape[2:])
                grown[:, : self.length] = buffers[layer][:, : self.length]
                buffers[layer] = grown
            buffers[layer][:, self.length : end] = new
        return self.keys[layer][:, :end], self.values[layer][:, :end]

    def advance(
        self,
        n_positions: int,
        key_valid: Bool[Tensor, "batch key"] | None,
        n_rotary_positions: Int[Tensor, "batch"],
    ) -> None:
        """Count `n_positions` more as filled; `key_valid` covers all filled positions."""
        self.length += n_positions
        self.key_valid = key_valid
        past = 0 if self.next_position is None else self.next_position
        self.next_position = past + n_rotary_positions


class Attention(WithViews):
    """Grouped-query attention of one layer, text or vision."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_key_value_heads: int,
        d_head: int,
        qkv_bias: bool,
        o_bias: bool,
        split_inputs: bool,
        rotary: bool = True,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_key_value_heads, self.d_head = n_heads, n_key_value_heads, d_head
        self.q_proj = nn.Linear(d_model, n_heads * d_head, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, n_key_value_heads * d_head, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, n_key_value_heads * d_head, bias=qkv_bias)
        self.has_qk_norm = qk_norm_eps is not None
        if qk_norm_eps is not None:
            self.q_norm = AllHeadsNorm(n_heads * d_head, qk_norm_eps)
            self.k_norm = AllHeadsNorm(n_key_value_heads * d_head, qk_norm_eps)
        self.o_proj = nn.Linear(n_heads * d_head, d_model, bias=o_bias)
        self.split_inputs = split_inputs
        if split_inputs:
            self.hook_q_input = HookPoint()  # [batch, pos, head, d_model], with use_split_qkv_input
            self.hook_k_input = HookPoint()  # [batch, pos, kv_head, d_model], with use_split_qkv_input
            self.hook_v_input = HookPoint()  # [batch, pos, kv_head, d_model], with use_split_qkv_input
        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_v = HookPoint()  # [batch, pos, kv_head, d_head]
        if rotary:
            self.hook_rot_q = HookPoint()  # [batch, pos, head, d_head]
            self.hook_rot_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_attn_scores = HookPoint()  # [batch, head, query, key]
        self.hook_pattern = HookPoint()  # [batch, head, query, key]
        self.hook_z = HookPoint()  # [batch, pos, head, d_head]
        self.hook_result = HookPoint()  # [batch, pos, head, d_model], with use_attn_result

    def forward(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        rotate: Rotation | None,
        run: "AttentionRun",
        layer: int,
    ) -> Float[Tensor, "*dims d_model"]:
        """`inputs` are what queries, keys and values are made from: one tensor three times, [*dims, d_model],
        or [*dims, head, d_model] where every head has its own (`use_split_qkv_input`). Where positions are
        not rotary, `rotate` is None."""
        hook = run.hook
        q_input, k_input, v_input = inputs
        q, k = _project(self.q_proj, q_input, self.n_heads), _project(self.k_proj, k_input, self.n_key_value_heads)
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = hook(self.hook_q, q), hook(self.hook_k, k)
        v = hook(self.hook_v, _project(self.v_proj, v_input, self.n_key_value_heads))
        if rotate is not None:
            q, k = hook(self.hook_rot_q, rotate(q)), hook(self.hook_rot_k, rotate(k))
        z = hook(self.hook_z, run.attend(self, layer, q, k, v))
        if not run.use_attn_result:
            return self.o_proj(z.flatten(-2))
        result = hook(self.hook_result, torch.einsum("...hd,hdm->...hm", z, self.W_O))
        return result.sum(-2) if self.o_proj.bias is None else result.sum(-2) + self.o_proj.bias

    @weight_view
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return _by_head(self.q_proj.weight, self.n_heads)

    @weight_view
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return _by_head(self.k_proj.weight, self.n_key_value_heads)

    @weight_view
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return _by_head(self.v_proj.weight, self.n_key_value_heads)

    @weight_view
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return self.o_proj.weight.view(-1, self.n_heads, self.d_head).permute(1, 2, 0)

    @weight_view
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        return _bias_by_head(self.q_proj, self.n_heads)

    @weight_view
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        return _bias_by_head(self.k_proj, self.n_key_value_heads)

    @weight_view
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        return _bias_by_head(self.v_proj, self.n_key_value_heads)

    @weight_view
    def b_O(self) -> Float[Tensor, "d_model"]:
        bias = self.o_proj.bias
        return absent_bias(self.o_proj.weight, self.o_proj.out_features) if bias is None else bias


class AttentionRun:
    """What one forward pass tells its attention layers: how tensors pass hooks, who sees whom, the KV cache."""

    def __init__(self, mask: AttentionMask, past: KVCache | None = None, use_attn_result: bool = False) -> None:
        self.mask, self.past, self.use_attn_result = mask, past, use_attn_result

    hook: HookFn = staticmethod(HookPoint.__call__)

    def attend(self, attn: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """z [batch, pos, head, d_head] from rotated queries and keys and from values."""
        if self.past is not None:
            k, v = self.past.extend(layer, k, v)
        return attend(q, k, v, self.mask, attn.hook_attn_scores, attn.hook_pattern)


def _project(linear: nn.Linear, x: Tensor, n_heads: int) -> Float[Tensor, "*dims head d_head"]:
    """x W per head; `x` is [*dims, d_model], or [*dims, head, d_model] with an input of its own per head."""
    per_head_input = x.ndim >= 4
    if not per_head_input:
        return linear(x).unflatten(-1, (n_heads, -1))
    out = torch.einsum("...hm,hmd->...hd", x, _by_head(linear.weight, n_heads))
    return out if linear.bias is None else out + linear.bias.view(n_heads, -1)


def _by_head(weight: Tensor, n_heads: int) -> Tensor:
    """[head * d_head, d_model] seen as [head, d_model, d_head]; a view."""
    return weight.view(n_heads, -1, weight.shape[1]).transpose(1, 2)


def _bias_by_head(linear: nn.Linear, n_heads: int) -> Tensor:
    if linear.bias is None:
        return absent_bias(linear.weight, n_heads, linear.out_features // n_heads)
    return linear.bias.view(n_heads, -1)
