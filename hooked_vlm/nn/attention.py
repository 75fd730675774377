"""Attention: the place where the presence of a hook chooses the arithmetic.

`attend` runs the fused kernel unless that layer's scores or pattern are wanted; only then are the [query, key]
tensors made (`hooked_vlm.nn.scores`). The two paths compute the same function (tested in float32 and bfloat16).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooked_vlm.errors import HookError
from hooked_vlm.nn.components import Linear, WithViews, bias_by_head, by_head, project, weight_view
from hooked_vlm.nn.forward_pass import ForwardPass
from hooked_vlm.nn.hooks import HookPoint, current_pass, has_context, listens
from hooked_vlm.nn.masks import AttentionMask
from hooked_vlm.nn.packing import Group
from hooked_vlm.nn.scores import (
    PLAIN,
    Scoring,
    attention_pattern,
    masked_scores,
    weighted_values,
    written_out_attention,
)
from hooked_vlm.nn.weight_access import absent_bias, bias_of, is_plain, values_of


class Attention(WithViews):
    """Grouped-query attention of one layer, text or vision."""

    def __init__(
        self,
        layer: int,
        d_model: int,
        n_heads: int,
        n_key_value_heads: int,
        d_head: int,
        qkv_bias: bool,
        o_bias: bool,
        split_inputs: bool,
        rotary: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = None,
        scoring: Scoring = PLAIN,
        post_norm: bool = False,
    ) -> None:
        """Attention of one layer.

        Args:
            qk_norm: from a number of heads, the norm of their queries or keys.
            post_norm: whether the block normalises what comes out.
        """
        super().__init__()
        self.layer, self.n_heads, self.n_key_value_heads, self.d_head = layer, n_heads, n_key_value_heads, d_head
        self.q_proj = Linear(d_model, n_heads * d_head, bias=qkv_bias)
        self.k_proj = Linear(d_model, n_key_value_heads * d_head, bias=qkv_bias)
        self.v_proj = Linear(d_model, n_key_value_heads * d_head, bias=qkv_bias)
        self.o_proj = Linear(n_heads * d_head, d_model, bias=o_bias)
        self.split_inputs = split_inputs
        if split_inputs:
            self.hook_attn_in = HookPoint()  # [batch, pos, head, d_model], with use_attn_in
            self.hook_q_input = HookPoint()  # [batch, pos, head, d_model], with use_split_qkv_input
            self.hook_k_input = HookPoint()  # [batch, pos, kv_head, d_model], with use_split_qkv_input
            self.hook_v_input = HookPoint()  # [batch, pos, kv_head, d_model], with use_split_qkv_input
        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_v = HookPoint()  # [batch, pos, kv_head, d_head]
        self.scoring, self.has_qk_norm, self.post_norm = scoring, qk_norm is not None, post_norm
        if qk_norm is not None:
            self.q_norm, self.k_norm = qk_norm(n_heads), qk_norm(n_key_value_heads)
            self.hook_q_normed = HookPoint()  # [batch, pos, head, d_head]
            self.hook_k_normed = HookPoint()  # [batch, pos, kv_head, d_head]
        if rotary:
            self.hook_rot_q = HookPoint()  # [batch, pos, head, d_head]
            self.hook_rot_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_attn_scores = HookPoint(packs=False)  # [batch, head, query, key]
        self.hook_pattern = HookPoint(packs=False)  # [batch, head, query, key]
        self.hook_z = HookPoint()  # [batch, pos, head, d_head]
        self.hook_result = HookPoint()  # [batch, pos, head, d_model], with use_attn_result
        if post_norm:
            self.hook_out = HookPoint()  # [batch, pos, d_model]

    def forward(
        self,
        x: Float[Tensor, "*dims d_model"],
        k_input: Float[Tensor, "*key_dims d_model"] | None = None,
        v_input: Float[Tensor, "*key_dims d_model"] | None = None,
    ) -> Float[Tensor, "*out d_model"]:
        """Return what attention writes: what is added to the stream, or goes through the block's post-norm first.

        Queries are computed from `x`; keys and values from `x`, too, or from inputs of their own: those of more
        positions, of which `x` has the last, or [batch, pos, head, d_model] with one for each head.
        """
        here = current_pass().on(x.device)
        k_input, v_input = x if k_input is None else k_input, x if v_input is None else v_input
        q = self.hook_q(project(self.q_proj, x, self.n_heads))  # [batch, pos, head, d_head]
        k = self.hook_k(project(self.k_proj, k_input, self.n_key_value_heads))  # [batch, pos, kv_head, d_head]
        v = self.hook_v(project(self.v_proj, v_input, self.n_key_value_heads))  # [batch, pos, kv_head, d_head]
        if self.has_qk_norm:
            q = self.hook_q_normed(self.q_norm(q))  # [batch, pos, head, d_head]
            k = self.hook_k_normed(self.k_norm(k))  # [batch, pos, kv_head, d_head]
        rotate = here.rotate_of(self.layer)
        if rotate is not None:
            of_queries = rotate if here.n_out is None else rotate.last(here.n_out)
            q = self.hook_rot_q(of_queries(q))  # [batch, pos, head, d_head]
            k = self.hook_rot_k(rotate(k))  # [batch, pos, kv_head, d_head]
        z = self.hook_z(self._attend(q, k, v, here))  # [batch, pos, head, d_head]
        out = self._sum_of_results(z) if here.cfg.use_attn_result else self.o_proj(z.flatten(-2))
        return self.hook_out(out) if self.post_norm else out  # [batch, pos, d_model]

    def _sum_of_results(self, z: Float[Tensor, "*dims head d_head"]) -> Float[Tensor, "*dims d_model"]:
        result = self.hook_result(self.head_results(z))  # [batch, pos, head, d_model]
        bias = self._output_bias_at(z)
        return result.sum(-2) if bias is None else result.sum(-2) + bias

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, here: ForwardPass) -> Tensor:
        """softmax(scores) v; `hook_z` has what it was made from in its context."""
        groups, mask, scoring = here.groups_of(self.layer), here.mask_of(self.layer), self.scoring
        if groups is not None and not (listens(self.hook_attn_scores) or listens(self.hook_pattern)):
            z = grouped_attention(q, k, v, groups, mask.causal, here.packing is not None, scoring)
            if has_context(self.hook_z):
                self.hook_z.tell(AttentionCall(here.pad(q), here.pad(k), here.pad(v), mask, scoring))
            return z
        q, k, v = here.pad(q), here.pad(k), here.pad(v)
        if here.past is not None:
            k, v = here.past.extend(self.layer, k, v)
        z = attend(q, k, v, mask, self.hook_attn_scores, self.hook_pattern, scoring)
        if has_context(self.hook_z):
            n_shared = 0 if here.past is None else here.past.n_shared
            self.hook_z.tell(AttentionCall(q, k, v, mask, scoring, n_shared))
        return here.pack(z)

    # ---------------------------------------------------------------- each head's own output

    def head_results(self, z: Float[Tensor, "*dims head d_head"]) -> Float[Tensor, "*dims head d_model"]:
        """Each head's output to the stream, z W_O, without the output bias.

        Where `o_proj` is hooked, or is not a plain linear layer (an adapter), it is called for each head alone.

        Raises:
            HookError: the output of all heads is not the sum of the outputs of each.
        """
        if is_plain(self.o_proj):
            return torch.einsum("...hd,hdm->...hm", z, self.W_O.to(z.device))
        only = torch.eye(self.n_heads, dtype=z.dtype, device=z.device)[:, :, None]
        bias, whole = self.o_proj(torch.zeros_like(z.flatten(-2))), self.o_proj(z.flatten(-2))
        result = torch.stack([self.o_proj((z * one).flatten(-2)) - bias for one in only], dim=-2)
        off = (result.sum(-2) + bias - whole).detach().abs()
        terms = (result.abs().sum(-2) + self.n_heads * bias.abs() + whole.abs()).detach().amax(-1, keepdim=True)
        if not (off <= 8 * torch.finfo(z.dtype).eps * terms).all():
            raise HookError(
                f"o_proj of layer {self.layer} is hooked or replaced by something not linear, so that the output of a "
                "single head is not defined: remove the hook, merge the adapter (or call model.eval(), if it "
                "has dropout), or call set_use_attn_result(False)"
            )
        return result

    def head_result(self, z: Float[Tensor, "*dims d_head"], head: int) -> Float[Tensor, "*dims d_model"]:
        """One head's output to the stream, z W_O, without the output bias."""
        if is_plain(self.o_proj):
            return z @ self.W_O[head].to(z.device)
        alone = z.new_zeros(*z.shape[:-1], self.n_heads, self.d_head)
        alone[..., head, :] = z
        return self.o_proj(alone.flatten(-2)) - self.o_proj(torch.zeros_like(alone.flatten(-2)))

    def output_bias(self) -> Float[Tensor, "d_model"] | None:
        """Output bias of `o_proj`; None if it has none."""
        return bias_of(self.o_proj, self.n_heads * self.d_head)

    def _output_bias_at(self, z: Float[Tensor, "*dims head d_head"]) -> Float[Tensor, "*#dims d_model"] | None:
        """Output bias at every position of z: a hook on `o_proj` may make it differ between positions."""
        return self.output_bias() if is_plain(self.o_proj) else self.o_proj(torch.zeros_like(z.flatten(-2)))

    @weight_view
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return by_head(values_of(self.q_proj), self.n_heads)

    @weight_view
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return by_head(values_of(self.k_proj), self.n_key_value_heads)

    @weight_view
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return by_head(values_of(self.v_proj), self.n_key_value_heads)

    @weight_view
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return values_of(self.o_proj).view(-1, self.n_heads, self.d_head).permute(1, 2, 0)

    @weight_view
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        return bias_by_head(self.q_proj, self.n_heads)

    @weight_view
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        return bias_by_head(self.k_proj, self.n_key_value_heads)

    @weight_view
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        return bias_by_head(self.v_proj, self.n_key_value_heads)

    @weight_view
    def b_O(self) -> Float[Tensor, "d_model"]:
        o_proj = self.o_proj
        return absent_bias(o_proj, o_proj.out_features) if o_proj.bias is None else values_of(o_proj, "bias")


# ---------------------------------------------------------------- z of queries, keys and values


def attend(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    v: Float[Tensor, "batch key kv_head d_head"],
    mask: AttentionMask,
    hook_attn_scores: nn.Module,
    hook_pattern: nn.Module,
    scoring: Scoring = PLAIN,
) -> Float[Tensor, "batch query head d_head"]:
    """softmax(q k^T / sqrt(d_head)) v with grouped key-value heads; rows of padding queries are zero."""
    valid = mask.query_valid(q.shape[1])
    if listens(hook_attn_scores) or listens(hook_pattern):
        scores = hook_attn_scores(masked_scores(q, k, mask, scoring))  # [batch, head, query, key]
        pattern = hook_pattern(attention_pattern(scores, valid))  # [batch, head, query, key]
        z = weighted_values(pattern, v)
    else:
        z = fused_attention(q, k, v, mask, scoring)
    return z if valid is None else z * valid[:, :, None, None]


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scoring: Scoring = PLAIN) -> Tensor:
    """z in PyTorch's fused kernel, which makes no [pos, pos] tensor; padding queries hold unused numbers."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    if not mask.is_simple(n_queries, n_keys):
        return _z(q, k, v, mask.dense(n_queries, n_keys, q.device), causal=False, scoring=scoring)
    padding = mask.uncached_left_padding
    if mask.causal and n_queries == n_keys and padding is not None:
        # Rolling every row to the left puts its padding last, where a causal mask hides it: the fused
        # causal kernel then needs no [pos, pos] mask.
        there = (torch.arange(n_queries, device=q.device) + padding[:, None]) % n_queries
        back = (torch.arange(n_queries, device=q.device) - padding[:, None]) % n_queries
        z = _z(_take(q, there), _take(k, there), _take(v, there), None, causal=True, scoring=scoring)
        return _take(z, back)
    if mask.causal and n_queries == n_keys:
        # without left padding, keys padded at the end lie in every real query's future
        return _z(q, k, v, None, causal=True, scoring=scoring)
    if n_queries == 1 or not mask.causal:
        key_mask = None if mask.key_valid is None else mask.key_valid[:, None, None, :]
        return _z(q, k, v, key_mask, causal=False, scoring=scoring)
    return _z(q, k, v, mask.dense(n_queries, n_keys, q.device), causal=False, scoring=scoring)


def _z(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scoring: Scoring) -> Tensor:
    """z under a mask that is written out [batch, 1, query, key], or causal; in the fused kernel if it knows the
    scoring."""
    if scoring.soft_cap is not None:
        return written_out_attention(q, k, v, mask, causal, scoring, scoring.soft_cap)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped, scale = q.shape[1] != k.shape[1], None if scoring.divisor is None else scoring.scale(q.shape[-1])
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped, scale=scale)
    return z.transpose(1, 2)


def _take(x: Tensor, order: Int[Tensor, "batch pos"]) -> Tensor:
    """Positions of `x` [batch, pos, head, d_head] in another order, row by row."""
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def grouped_attention(
    q: Float[Tensor, "*dims head d_head"],
    k: Float[Tensor, "*dims kv_head d_head"],
    v: Float[Tensor, "*dims kv_head d_head"],
    groups: Sequence[Group],
    causal: bool,
    packed: bool = True,
    scoring: Scoring = PLAIN,
) -> Float[Tensor, "*dims head d_head"]:
    """z in the fused kernel, one group of positions at a time; zero at positions of no group.

    Groups number the positions of packed rows, [position, head, d_head], or those of all rows of a batch.
    """
    if not packed:
        flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
        return grouped_attention(flat_q, flat_k, flat_v, groups, causal, scoring=scoring).view_as(q)
    z = torch.empty_like(q) if sum(group.n_positions for group in groups) == len(q) else torch.zeros_like(q)
    for group in groups:
        own = fused_attention(group.take(q), group.take(k), group.take(v), group.mask(causal), scoring)
        z = group.put(z, own)
    return z


@dataclass(eq=False, slots=True)
class AttentionCall:
    """Queries, keys and values of one layer's pass; a hook on `hook_z` finds them as `hook.ctx["attention"]`.

    Scores, patterns or another z for a few queries or heads are made from it without a [pos, pos] tensor,
    also under a key-value cache, where `k` and `v` hold all positions so far.
    """

    q: Float[Tensor, "batch query head d_head"]
    k: Float[Tensor, "batch key kv_head d_head"]
    v: Float[Tensor, "batch key kv_head d_head"]
    mask: AttentionMask
    scoring: Scoring = PLAIN
    n_shared: int = 0
    """Number of leading keys and values shared by all runs of the batch (`sweep`)."""

    @property
    def n_past(self) -> int:
        """Keys from earlier passes, in front of this one's."""
        return self.k.shape[1] - self.q.shape[1]

    def scores(
        self, queries: Int[Tensor, "#batch row"], heads: Sequence[int] | None = None
    ) -> Float[Tensor, "batch head row key"]:
        """Masked scores of some queries, given as indices into the query axis, and of all or some heads."""
        q, k, _ = self._of(queries, heads)
        return masked_scores(q, k, self.mask, self.scoring, queries + self.n_past)

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
        seen = self.visible(queries) if visible is None else visible
        return _z(q, k, v, seen, causal=False, scoring=self.scoring)

    def visible(self, queries: Int[Tensor, "#batch row"]) -> Bool[Tensor, "#batch 1 row key"]:
        """Mask of the keys that these queries see."""
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
        """Select rows `first` to `stop` - 1 of the batch."""
        q, k, v = (x[first:stop] for x in (self.q, self.k, self.v))
        return AttentionCall(q, k, v, self.mask.rows(first, stop), self.scoring, self.n_shared)
