"""Attention: the place where the presence of a hook chooses the arithmetic.

`attend` runs the fused kernel unless that layer's scores or pattern are hooked; only then are the
[query, key] tensors made. The two paths compute the same function (tested in float32 and bfloat16).
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooked_vlm.components import AllHeadsNorm, HookFn, WithViews, weight_view
from hooked_vlm.hooks import HookPoint, call_told, is_hooked
from hooked_vlm.kv_cache import EarlierKeys
from hooked_vlm.masks import AttentionMask
from hooked_vlm.rotary import Rotation
from hooked_vlm.weight_access import absent_bias, values_of


def attend(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    v: Float[Tensor, "batch key kv_head d_head"],
    mask: AttentionMask,
    hook_attn_scores: HookPoint,
    hook_pattern: HookPoint,
    hook: HookFn = HookPoint.__call__,
) -> Float[Tensor, "batch query head d_head"]:
    """softmax(q k^T / sqrt(d_head)) v with grouped key-value heads; rows of padding queries are zero."""
    if is_hooked(hook_attn_scores) or is_hooked(hook_pattern):
        z = _explicit(q, k, v, mask, hook_attn_scores, hook_pattern, hook)
    else:
        z = fused_attention(q, k, v, mask)
    valid = mask.query_valid(q.shape[1])
    return z if valid is None else z * valid[:, :, None, None]


def attention_scores(
    q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key kv_head d_head"]
) -> Float[Tensor, "batch head query key"]:
    """Unmasked scores, q k^T / sqrt(d_head)."""
    scale = q.shape[-1] ** -0.5
    before, after = (scale, 1.0) if q.dtype == torch.float16 else (1.0, scale)  # float16 ends at 65504
    scores = _by_group(q.transpose(1, 2) * before, k.shape[2]) @ k.permute(0, 2, 3, 1)
    return scores.view(q.shape[0], q.shape[2], q.shape[1], k.shape[1]) * after


def weighted_values(
    pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch key kv_head d_head"]
) -> Float[Tensor, "batch query head d_head"]:
    """Values averaged by a pattern."""
    z = _by_group(pattern, v.shape[2]) @ v.transpose(1, 2)
    return z.view(*pattern.shape[:3], v.shape[-1]).transpose(1, 2)


def _by_group(x: Float[Tensor, "batch head query d"], n_groups: int) -> Float[Tensor, "batch group grouped d"]:
    """The queries of all heads that share keys and values, one after the other."""
    return x.reshape(x.shape[0], n_groups, -1, x.shape[-1])


def attention_pattern(
    scores: Float[Tensor, "*dims query key"], keep_float32: bool = False
) -> Float[Tensor, "*dims query key"]:
    """Softmax over keys, made in float32 at least and given in the scores' dtype (unless `keep_float32`)."""
    pattern = scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype))
    return pattern if keep_float32 else pattern.to(scores.dtype)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What a layer's z was made from; a hook on `hook_z` finds it as `hook.ctx["attention"]`.

    Scores, patterns or another z for a few queries or heads are made from it without a [pos, pos] tensor,
    also under a key-value cache, where `k` and `v` hold all positions so far.
    """

    q: Float[Tensor, "batch query head d_head"]
    k: Float[Tensor, "batch key kv_head d_head"]
    v: Float[Tensor, "batch key kv_head d_head"]
    mask: AttentionMask
    n_shared: int = 0
    """So many keys and values, from the first on, are the same for all runs that share the batch (`sweep`)."""

    @property
    def n_past(self) -> int:
        """Keys from earlier passes, in front of this one's."""
        return self.k.shape[1] - self.q.shape[1]

    def scores(
        self, queries: Int[Tensor, "#batch row"], heads: Sequence[int] | None = None
    ) -> Float[Tensor, "batch head row key"]:
        """Masked scores of some queries, given as indices into the query axis, and of all or some heads."""
        q, k, _ = self._of(queries, heads)
        return attention_scores(q, k).masked_fill(~self.visible(queries), -torch.inf)

    def pattern(
        self, queries: Int[Tensor, "#batch row"], heads: Sequence[int] | None = None
    ) -> Float[Tensor, "batch head row key"]:
        """The attention of some queries and heads, in float32 at least."""
        return attention_pattern(self.scores(queries, heads), keep_float32=True)

    def z_under(
        self, pattern: Float[Tensor, "batch head row key"], heads: Sequence[int]
    ) -> Float[Tensor, "batch row head d_head"]:
        """Values averaged by a pattern of some heads."""
        _, _, v = self._of(torch.zeros(1, 1, dtype=torch.long, device=self.q.device), heads)
        return weighted_values(pattern.to(v.dtype), v)

    def z(
        self,
        queries: Int[Tensor, "#batch row"],
        heads: Sequence[int] | None = None,
        visible: Bool[Tensor, "#batch 1 row key"] | None = None,
    ) -> Float[Tensor, "batch row head d_head"]:
        """z of some queries and heads, in the fused kernel; what they see may be given."""
        q, k, v = self._of(queries, heads)
        return _sdpa(q, k, v, self.visible(queries) if visible is None else visible, causal=False)

    def visible(self, queries: Int[Tensor, "#batch row"]) -> Bool[Tensor, "#batch 1 row key"]:
        """Which keys some queries see."""
        return self.mask.visible(queries + self.n_past, self.k.shape[1])

    def _of(self, queries: Int[Tensor, "#batch row"], heads: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q, self.k, self.v
        if queries.shape[1] < q.shape[1] or len(queries) > 1:
            q = q.gather(1, queries[:, :, None, None].expand(len(q), -1, *q.shape[2:]))
        elif q.shape[1] > 1:
            q = q[:, queries[0]]
        if heads is not None and list(heads) != list(range(q.shape[2])):
            chosen = torch.tensor(heads, device=q.device)
            groups = chosen // (q.shape[2] // k.shape[2])
            q, k, v = q[:, :, chosen], k[:, :, groups], v[:, :, groups]
        return q, k, v

    def rows(self, first: int, stop: int) -> "AttentionCall":
        """The same of some rows of the batch."""
        valid, padding = self.mask.key_valid, self.mask.uncached_left_padding
        mask = replace(
            self.mask,
            key_valid=None if valid is None else valid[first:stop],
            uncached_left_padding=None if padding is None else padding[first:stop],
        )
        return AttentionCall(self.q[first:stop], self.k[first:stop], self.v[first:stop], mask, self.n_shared)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    hook_attn_scores: HookPoint,
    hook_pattern: HookPoint,
    hook: HookFn,
) -> Tensor:
    allowed = mask.dense(q.shape[1], k.shape[1], q.device)
    scores = hook(hook_attn_scores, attention_scores(q, k).masked_fill(~allowed, -torch.inf))
    pattern = attention_pattern(scores)
    valid = mask.query_valid(q.shape[1])
    if valid is not None:
        pattern = pattern.masked_fill(~valid[:, None, :, None], 0.0)
    pattern = hook(hook_pattern, pattern)
    return weighted_values(pattern, v)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """z in PyTorch's fused kernel, which makes no [pos, pos] tensor; padding queries hold unused numbers."""
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
        self, inputs: tuple[Tensor, Tensor, Tensor], run: "AttentionRun", asking: "AttentionRun", layer: int
    ) -> Float[Tensor, "*dims d_model"]:
        """`inputs` are what queries, keys and values are made from: one tensor three times, [*dims, d_model],
        or [*dims, head, d_model] where every head has its own (`use_split_qkv_input`). Keys and values are of
        the positions of `run`, queries of those of `asking`, the same or the last of them."""
        q_input, k_input, v_input = inputs
        q, k = _project(self.q_proj, q_input, self.n_heads), _project(self.k_proj, k_input, self.n_key_value_heads)
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = asking.hook(self.hook_q, q), run.hook(self.hook_k, k)
        v = run.hook(self.hook_v, _project(self.v_proj, v_input, self.n_key_value_heads))
        if run.rotate is not None and asking.rotate is not None:
            q, k = asking.hook(self.hook_rot_q, asking.rotate(q)), run.hook(self.hook_rot_k, run.rotate(k))
        z = asking.attend(self, layer, q, k, v)
        if not run.use_attn_result:
            return self.o_proj(z.flatten(-2))
        result = asking.hook(self.hook_result, torch.einsum("...hd,hdm->...hm", z, self.W_O))
        return result.sum(-2) if self.o_proj.bias is None else result.sum(-2) + values_of(self.o_proj, "bias")

    @weight_view
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return _by_head(values_of(self.q_proj), self.n_heads)

    @weight_view
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return _by_head(values_of(self.k_proj), self.n_key_value_heads)

    @weight_view
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return _by_head(values_of(self.v_proj), self.n_key_value_heads)

    @weight_view
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return values_of(self.o_proj).view(-1, self.n_heads, self.d_head).permute(1, 2, 0)

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
        o_proj = self.o_proj
        return absent_bias(o_proj, o_proj.out_features) if o_proj.bias is None else values_of(o_proj, "bias")


@dataclass(eq=False)
class AttentionRun:
    """What one pass tells its layers: who sees whom, rotary positions, earlier keys, and what hooks are told."""

    mask: AttentionMask
    rotate: Rotation | None = None
    """None where positions are not rotary."""
    past: EarlierKeys | None = None
    use_attn_result: bool = False
    told: Mapping[str, Any] = field(default_factory=dict)
    """What a hook finds in `hook.ctx` while it is called: `positions`, the first of them as a plain number
    (`first_position`), and `step` where there is a cache."""
    _elsewhere: "dict[torch.device, AttentionRun]" = field(init=False, repr=False, default_factory=dict)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "AttentionRun":
        """The same for layers on another device, made once. (Earlier keys lie with their layers already.)

        `accelerate` calls it, with its own signature, where a model's parts are spread over devices.
        """
        device = torch.device(device)
        if device not in self._elsewhere:
            self._elsewhere[device] = self._moved(device)
        return self._elsewhere[device]

    def _moved(self, device: torch.device) -> "AttentionRun":
        moved = copy(self)  # which shares what was made before
        moved.mask, moved.rotate = self.mask.to(device), None if self.rotate is None else self.rotate.to(device)
        moved.told = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.told.items()}
        return moved

    @property
    def step(self) -> dict[str, Any]:
        """What hooks are told that have no positions."""
        return {name: self.told[name] for name in self.told if name == "step"}

    def last(self, n: int) -> "AttentionRun":
        """The same for the last `n` positions as those that ask; keys stay as they are."""
        rotate = None if self.rotate is None else self.rotate.last(n)
        told = dict(self.told)
        if "positions" in told:
            told["first_position"] += len(told["positions"]) - n
            told["positions"] = told["positions"][-n:]
        return replace(self, rotate=rotate, told=told)

    @property
    def packs(self) -> bool:
        """Whether layers see rows without their padding (`hooked_vlm.packing`)."""
        return False

    def pack(self, padded: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "..."]:
        """As layers see it."""
        return padded

    def pad(self, packed: Float[Tensor, "..."]) -> Float[Tensor, "batch pos *rest"]:
        """As hooks see it."""
        return packed

    def without_positions(self) -> "AttentionRun":
        """The same, where rows of the batch are at different positions."""
        return replace(self, told=self.step)

    def call(self, point: HookPoint, x: Tensor) -> Tensor:
        """`x` past a hook point that sees it as it is."""
        return call_told(point, x, self.told) if is_hooked(point) else x

    def hook(self, point: HookPoint, x: Tensor) -> Tensor:
        """`x` past a hook point, which may see it in another shape."""
        return self.call(point, x)

    def attend(self, attn: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """z [batch, pos, head, d_head] from rotated queries and keys and from values."""
        if self.past is not None:
            k, v = self.past.extend(layer, k, v)
        z = attend(q, k, v, self.mask, attn.hook_attn_scores, attn.hook_pattern, self.call)
        if not is_hooked(attn.hook_z):
            return z
        return self.hook_z(attn, z, AttentionCall(q, k, v, self.mask, 0 if self.past is None else self.past.n_shared))

    def hook_z(self, attn: Attention, z: Tensor, call: AttentionCall) -> Tensor:
        """z past its hook point, which is told what z was made from."""
        return call_told(attn.hook_z, z, {**self.told, "attention": call})


def _project(linear: nn.Linear, x: Tensor, n_heads: int) -> Float[Tensor, "*dims head d_head"]:
    """x W per head; `x` is [*dims, d_model], or [*dims, head, d_model] with an input of its own per head."""
    per_head_input = x.ndim >= 4
    if not per_head_input:
        return linear(x).unflatten(-1, (n_heads, -1))
    out = torch.einsum("...hm,hmd->...hd", x, _by_head(values_of(linear), n_heads))
    return out if linear.bias is None else out + _bias_by_head(linear, n_heads)


def _by_head(weight: Tensor, n_heads: int) -> Tensor:
    """[head * d_head, d_model] seen as [head, d_model, d_head]; a view."""
    return weight.view(n_heads, -1, weight.shape[1]).transpose(1, 2)


def _bias_by_head(linear: nn.Linear, n_heads: int) -> Tensor:
    if linear.bias is None:
        return absent_bias(linear, n_heads, linear.out_features // n_heads)
    return values_of(linear, "bias").view(n_heads, -1)
