"""The parts both towers are made of: norms, MLP, embeddings and unembedding.

Weights keep the checkpoint's own `nn.Linear` layout; `W_*` and `b_*` are views of them in
TransformerLens' shapes, so that an edit of a view edits the model.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.token_layout import Grid
from hooked_vlm.nn.hooks import HookPoint
from hooked_vlm.nn.rotary import patch_places
from hooked_vlm.nn.weight_access import absent_bias, bias_of, is_plain, values_of
from hooked_vlm.vision_config import VisionConfig


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of CLIP-like vision towers."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its approximation by tanh."""
    return F.gelu(x, approximate="tanh")


def soft_capped(x: Float[Tensor, "*dims"], cap: float | None) -> Float[Tensor, "*dims"]:
    """cap * tanh(x / cap); x itself without a cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}


class _Registered:
    """A submodule or parameter found like a plain attribute; nn.Module finds it only after an AttributeError."""

    def __init__(self, registry: str, name: str) -> None:
        self.registry, self.name = registry, name

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        try:
            return module.__dict__[self.registry][self.name]
        except KeyError:  # of this module it is none, or something else: nn.Module.__getattr__ looks further
            raise AttributeError(self.name) from None


class Part(nn.Module):
    """A module that finds its submodules and parameters fast: a forward pass asks for a thousand of them."""

    def __setattr__(self, name: str, value: Any) -> None:
        registry = "_modules" if isinstance(value, nn.Module) else "_parameters"
        if isinstance(value, nn.Module | nn.Parameter) and not hasattr(type(self), name):
            setattr(type(self), name, _Registered(registry, name))
        super().__setattr__(name, value)


class weight_view(property):
    """A weight seen in another shape. Assigning to it, as `W_O *= 2` does in the end, writes into the weight."""

    def __set__(self, module: Any, value: Any) -> None:
        with torch.no_grad():
            self.__get__(module).copy_(value)


class WithViews(Part):
    """A module whose `weight_view`s may be assigned to."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), weight_view):
            object.__setattr__(self, name, value)  # nn.Module would register a parameter of this name
        else:
            super().__setattr__(name, value)


class Linear(Part, nn.Linear):
    """PyTorch's linear layer."""


class Norm(WithViews):
    """RMSNorm, or LayerNorm when `centered`; statistics in float32 as in the reference.

    `hook_scale` is the denominator, sqrt(variance + eps), [..., 1]; `hook_normalized` what weight and bias are applied
    to, in the dtype in which the reference multiplies; `hook_out` what the next layer reads.

    Args:
        offset: whether the weight is an offset from 1 (Gemma).
    """

    def __init__(self, d_model: int, eps: float, centered: bool, offset: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.centered, self.offset = centered, offset
        self.weight = nn.Parameter(torch.empty(d_model))
        self.bias = nn.Parameter(torch.empty(d_model)) if centered else None
        self.hook_scale = HookPoint()  # [batch, pos, 1]
        self.hook_normalized = HookPoint()  # [batch, pos, d_model]
        self.hook_out = HookPoint()  # [batch, pos, d_model]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.offset else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @weight_view
    def w(self) -> Float[Tensor, "d_model"]:
        """The weight (TransformerLens' name), which may be an offset from 1: its tools read
        `cfg.rmsnorm_uses_offset`."""
        return values_of(self)

    @property
    def factor(self) -> Float[Tensor, "d_model"]:
        """What the normalised stream is multiplied by: the weight, or 1 + weight in float32 at least."""
        return one_plus(self.w) if self.offset else self.w

    def frozen(
        self, part: Float[Tensor, "*dims d_model"], scale: Float[Tensor, "*#dims 1"]
    ) -> Float[Tensor, "*dims d_model"]:
        """What an RMSNorm makes of a part of its input when the denominator is that of a run: such parts sum to the
        output of the run."""
        return (part / scale.to(part.device) * self.factor.to(part.device)).to(part.dtype)

    def forward(self, x: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims d_model"]:
        full = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        if self.centered:
            full = full - full.mean(-1, keepdim=True)
        scale = self.hook_scale((full.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())  # [batch, pos, 1]
        if self.offset:  # in float32, rounded last
            normalized = self.hook_normalized(full / scale)  # [batch, pos, d_model]
            return self.hook_out((normalized * one_plus(self.weight)).to(x.dtype))  # [batch, pos, d_model]
        if self.bias is None:  # the reference rounds before the weight in RMSNorm, after it in LayerNorm
            normalized = self.hook_normalized((full / scale).to(x.dtype))  # [batch, pos, d_model]
            return self.hook_out(normalized * self.weight)  # [batch, pos, d_model]
        normalized = self.hook_normalized(full / scale)  # [batch, pos, d_model]
        return self.hook_out((normalized * self.weight + self.bias).to(x.dtype))  # [batch, pos, d_model]


def one_plus(weight: Float[Tensor, "d"]) -> Float[Tensor, "d"]:
    """1 + a norm's weight, in float32 at least: in bfloat16 the sum would be rounded."""
    return 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))


class MLP(WithViews):
    """act(gate(x)) * in(x) when gated, act(in(x)) otherwise, then out."""

    def __init__(self, d_model: int, d_mlp: int, act_fn: str, gated: bool, bias: bool, post_norm: bool = False) -> None:
        """An MLP; `post_norm`: whether the block normalises what comes out."""
        super().__init__()
        self.act, self.d_mlp = ACTIVATIONS[act_fn], d_mlp
        self.gate_proj = Linear(d_model, d_mlp, bias=bias) if gated else None
        self.in_proj = Linear(d_model, d_mlp, bias=bias)
        self.out_proj = Linear(d_mlp, d_model, bias=bias)
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp]
        if gated:
            self.hook_pre_linear = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # [batch, pos, d_mlp]
        self.post_norm = post_norm
        if post_norm:
            self.hook_out = HookPoint()  # [batch, pos, d_model]

    def forward(self, x: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims d_model"]:
        if self.gate_proj is None:
            post = self.act(self.hook_pre(self.in_proj(x)))  # [batch, pos, d_mlp]
        else:
            pre = self.hook_pre(self.gate_proj(x))  # [batch, pos, d_mlp]
            post = self.act(pre) * self.hook_pre_linear(self.in_proj(x))  # [batch, pos, d_mlp]
        out = self.out_proj(self.hook_post(post))
        return self.hook_out(out) if self.post_norm else out  # [batch, pos, d_model]

    def output_bias(self) -> Float[Tensor, "d_model"] | None:
        """Output bias of `out_proj`; None if it has none."""
        return bias_of(self.out_proj, self.d_mlp)

    @weight_view
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return values_of(self.in_proj).T

    @weight_view
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"] | None:
        """None without a gate."""
        return None if self.gate_proj is None else values_of(self.gate_proj).T

    @weight_view
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return values_of(self.out_proj).T

    @weight_view
    def b_in(self) -> Float[Tensor, "d_mlp"]:
        return _bias(self.in_proj)

    @weight_view
    def b_out(self) -> Float[Tensor, "d_model"]:
        return _bias(self.out_proj)


def _bias(linear: nn.Linear) -> Tensor:
    return absent_bias(linear, linear.out_features) if linear.bias is None else values_of(linear, "bias")


class Embed(WithViews, nn.Embedding):
    """Token embedding, multiplied by `scale` where there is one (rounded to the weights' dtype, as in Gemma)."""

    def __init__(self, d_vocab: int, d_model: int, scale: float | None = None) -> None:
        super().__init__(d_vocab, d_model)
        self.scale = scale

    @weight_view
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """What is looked up, before the scale."""
        return values_of(self)

    def forward(self, input: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        embedded = super().forward(input)
        if self.scale is None:
            return embedded
        return embedded * torch.tensor(self.scale, dtype=torch.float32).to(embedded.dtype)  # on the host: no copy


class Unembed(WithViews, nn.Linear):
    """Logits from the normalised residual stream, under a soft cap where there is one."""

    def __init__(self, d_model: int, d_vocab: int, soft_cap: float | None = None) -> None:
        super().__init__(d_model, d_vocab, bias=False)
        self.soft_cap = soft_cap

    def forward(self, input: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims d_vocab"]:
        return soft_capped(super().forward(input), self.soft_cap)

    @weight_view
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return values_of(self).T

    @weight_view
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        return absent_bias(self, self.out_features)


def project(linear: nn.Module, x: Float[Tensor, "*dims d_model"], n_heads: int) -> Float[Tensor, "*out head d_head"]:
    """x W by heads. `x` is [..., d_model], or [batch, pos, head, d_model] with an input of its own for each head.

    What is not a plain linear layer, or is hooked, is called for each head's input.
    """
    if x.ndim < 4:
        return linear(x).reshape(*x.shape[:-1], n_heads, -1)
    if not is_plain(linear):
        each = [linear(x[..., head, :]).unflatten(-1, (n_heads, -1))[..., head, :] for head in range(n_heads)]
        return torch.stack(each, dim=-2)
    out = torch.einsum("...hm,hmd->...hd", x, by_head(values_of(linear), n_heads))
    return out if linear.bias is None else out + bias_by_head(linear, n_heads)


def project_head(
    linear: nn.Module, x: Float[Tensor, "batch pos d_model"], n_heads: int, head: int
) -> Float[Tensor, "batch pos d_head"]:
    """x W of one head."""
    if not is_plain(linear):
        return project(linear, x, n_heads)[..., head, :]
    out = x @ by_head(values_of(linear), n_heads)[head]
    return out if linear.bias is None else out + bias_by_head(linear, n_heads)[head]


def by_head(weight: Tensor, n_heads: int) -> Tensor:
    """[head * d_head, d_model] seen as [head, d_model, d_head]; a view."""
    return weight.view(n_heads, -1, weight.shape[1]).transpose(1, 2)


def bias_by_head(linear: Any, n_heads: int) -> Tensor:
    if linear.bias is None:
        return absent_bias(linear, n_heads, linear.out_features // n_heads)
    return values_of(linear, "bias").view(n_heads, -1)


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
        places = patch_places((1, rows, cols), cfg.merge_size).to(learned.device)
        return learned[:, places[:, 0] * cols + places[:, 1]]

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
        self.weight = nn.Parameter(torch.empty(cfg.d_model))
        self.bias = nn.Parameter(torch.empty(cfg.d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
