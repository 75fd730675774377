"""Rotary positions: one, or three at once (M-RoPE), for text; two (row, column) for image patches.

Numerics follow `transformers/models/qwen2_vl/modeling_qwen2_vl.py`: angles in float32, the text side's
cosines rounded to the activations' dtype, the vision side rotated in float32.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """Cosines and sines of one forward pass; calling it rotates queries or keys.

    `cos` and `sin` have the leading axes of the tensors they rotate and half of `d_head`: the second
    half of a head turns by the same angles (rotate_half, not interleaved).
    """

    cos: Float[Tensor, "*dims half"]
    sin: Float[Tensor, "*dims half"]

    def __call__(self, x: Float[Tensor, "*dims head d_head"]) -> Float[Tensor, "*dims head d_head"]:
        cos, sin = self.cos.unsqueeze(-2), self.sin.unsqueeze(-2)
        a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def frequencies(d_rotary: int, theta: float, device: torch.device) -> Float[Tensor, "half"]:
    """Angle per unit of position, theta^(-2i/d), for i = 0 .. d/2 - 1."""
    exponents = torch.arange(0, d_rotary, 2, dtype=torch.float32, device=device) / d_rotary
    return 1.0 / (theta**exponents)


def text_rotation(
    position_ids: Int[Tensor, "axis batch pos"],
    d_head: int,
    theta: float,
    mrope_section: tuple[int, ...] | None,
    dtype: torch.dtype,
) -> Rotation:
    """The rotation of text queries and keys.

    With `mrope_section` the frequencies are shared out between the three position axes (temporal,
    height, width) in consecutive chunks; without it the first axis turns all of them.
    """
    angles = position_ids[..., None].float() * frequencies(d_head, theta, position_ids.device)
    if mrope_section is None:
        angles = angles[0]
    else:
        chunks = angles.split(list(mrope_section), dim=-1)
        angles = torch.cat([chunk[i % 3] for i, chunk in enumerate(chunks)], dim=-1)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def patch_rotation(rows_cols: Int[Tensor, "patch 2"], d_head: int, theta: float) -> Rotation:
    """The rotation of image patches: half of the frequencies turn with the row, half with the column."""
    angles = rows_cols[..., None].float() * frequencies(d_head // 2, theta, rows_cols.device)
    angles = angles.flatten(-2)
    return Rotation(angles.cos(), angles.sin())
