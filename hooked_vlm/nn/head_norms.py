"""Norms of queries and keys."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.nn.components import one_plus


class AllHeadsNorm(nn.Module):
    """RMSNorm of queries or keys over the width of all heads together."""

    def __init__(self, n_heads: int, d_head: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(n_heads * d_head))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*dims head d_head"]) -> Float[Tensor, "*dims head d_head"]:
        full = x.flatten(-2).to(torch.promote_types(x.dtype, torch.float32))
        normalized = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normalized.to(x.dtype) * self.weight).unflatten(-1, x.shape[-2:])


class EachHeadNorm(nn.Module):
    """RMSNorm of queries or keys, each head by itself; one weight of a head's width for all (`offset` as in `Norm`)."""

    def __init__(self, d_head: int, eps: float, offset: bool = False) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(d_head))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.offset else 1.0)

    def forward(self, x: Float[Tensor, "*dims head d_head"]) -> Float[Tensor, "*dims head d_head"]:
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        normalized = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (normalized * one_plus(self.weight)).to(x.dtype)
        return normalized.to(x.dtype) * self.weight
