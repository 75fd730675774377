"""Rotary positions: one, or three at once (M-RoPE), for text; two (row, column) for image patches.

Numerics follow `transformers/models/qwen2_vl/modeling_qwen2_vl.py`: angles in float32, the text side's
cosines rounded to the activations' dtype, the vision side rotated in float32. Scalings follow
`transformers/modeling_rope_utils.py`, but as a function of the positions alone: nothing is remembered from
one run to the next, and each row of a batch is scaled by its own length.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.config import RopeScaling
from hooked_vlm.inputs.token_layout import Grid


@dataclass(frozen=True, eq=False)
class Rotation:
    """Cosines and sines of one forward pass; calling it rotates queries or keys.

    `cos` and `sin` have the leading axes of the tensors they rotate. The two halves of a head turn by the same angles
    (rotate_half, not interleaved); the sines of the first half are negative.
    """

    cos: Float[Tensor, "*dims d_head"]
    sin: Float[Tensor, "*dims d_head"]

    @classmethod
    def by(
        cls, angles: Float[Tensor, "*dims half"], factor: float = 1.0, dtype: torch.dtype | None = None
    ) -> "Rotation":
        """That by some angles, one for each pair of entries; `factor` multiplies cosines and sines."""
        cos, sin = angles.cos(), angles.sin()
        if factor != 1.0:
            cos, sin = cos * factor, sin * factor
        cos, sin = cos.to(dtype or cos.dtype), sin.to(dtype or sin.dtype)
        return cls(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))

    @cached_property
    def _over_heads(self) -> tuple[Float[Tensor, "*dims 1 d_head"], Float[Tensor, "*dims 1 d_head"]]:
        """Cosines and sines with an axis for heads."""
        return self.cos.unsqueeze(-2), self.sin.unsqueeze(-2)

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Rotation":
        """That of cosines and sines changed alike."""
        return Rotation(change(self.cos), change(self.sin))

    def to(self, device: torch.device) -> "Rotation":
        return self.changed(lambda x: x.to(device))

    def last(self, n: int) -> "Rotation":
        """That of the last `n` positions."""
        return self.positions(slice(-n, None))

    def rows(self, row: int) -> "Rotation":
        """That of one row of the batch, as a batch of one."""
        row = row if len(self.cos) > 1 else 0
        return Rotation(self.cos[row : row + 1], self.sin[row : row + 1])

    def positions(self, span: slice | Int[Tensor, "pos"]) -> "Rotation":
        """That of some positions."""
        return Rotation(self.cos[..., span, :], self.sin[..., span, :])

    def by_row(self, n: int) -> "Rotation":
        """That of positions of `n` equally long rows, given one row after the other."""
        return Rotation(self.cos.unflatten(0, (n, -1)), self.sin.unflatten(0, (n, -1)))

    def repeat(self, n: int) -> "Rotation":
        """That of `n` runs of the same batch."""
        if n == 1 or len(self.cos) == 1:
            return self
        return Rotation(self.cos.repeat(n, 1, 1), self.sin.repeat(n, 1, 1))

    def inverse(self) -> "Rotation":
        """Return the inverse rotation; cosines and sines that carry a factor are divided by its square."""
        scale = self.cos.square() + self.sin.square()
        return Rotation(self.cos / scale, -self.sin / scale)

    def __call__(self, x: Float[Tensor, "*dims head d_head"]) -> Float[Tensor, "*dims head d_head"]:
        cos, sin = self._over_heads
        if x.dtype != cos.dtype:
            full = x.to(torch.promote_types(x.dtype, cos.dtype))
            return (full * cos + full.roll(full.shape[-1] // 2, dims=-1) * sin).to(x.dtype)
        return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Rotations:
    """The rotation of each kind of layers, made when the first layer of the kind asks for it."""

    def __init__(self, of_kind: Callable[[int], Rotation]) -> None:
        self._of_kind = cache(of_kind)

    def __getitem__(self, kind: int) -> Rotation:
        return self._of_kind(kind)

    def then(self, change: Callable[[Rotation], Rotation]) -> "Rotations":
        """These with a change each, made when it is asked for."""
        return Rotations(lambda kind: change(self[kind]))


def frequencies(d_rotary: int, theta: float, device: torch.device) -> Float[Tensor, "half"]:
    """Angle per unit of position, theta^(-2i/d), for i = 0 .. d/2 - 1."""
    exponents = torch.arange(0, d_rotary, 2, dtype=torch.float32, device=device) / d_rotary
    return 1.0 / (theta**exponents)


def scaled_frequencies(
    d_rotary: int, theta: float, scaling: RopeScaling, lengths: Int[Tensor, "batch"]
) -> Float[Tensor, "#batch 1 half"]:
    """Angles per unit of position for rows that are `lengths` positions long so far.

    linear: all divided by `factor`. dynamic (neural tangent kernel): beyond the trained length n the base
    becomes theta * (factor * length / n - factor + 1)^(d/(d-2)). longrope: divided by `short_factor` up to
    the trained length and by `long_factor` beyond. llama3: see `_by_wavelength`.
    """
    device = lengths.device
    if scaling.kind == "linear":
        return frequencies(d_rotary, theta, device)[None, None] / scaling.factor
    if scaling.kind == "llama3":
        return _by_wavelength(frequencies(d_rotary, theta, device), scaling)[None, None]
    trained = scaling.n_ctx_trained
    if scaling.kind == "dynamic":
        stretch = scaling.factor * lengths.clamp(min=trained).float() / trained - (scaling.factor - 1)
        bases = theta * stretch ** (d_rotary / (d_rotary - 2))
        exponents = torch.arange(0, d_rotary, 2, dtype=torch.float32, device=device) / d_rotary
        return 1.0 / bases[:, None, None] ** exponents
    short, long = (torch.tensor(f, device=device) for f in (scaling.short_factor, scaling.long_factor))
    divisors = torch.where(lengths[:, None, None] > trained, long, short)
    return frequencies(d_rotary, theta, device) / divisors


def _by_wavelength(plain: Float[Tensor, "half"], scaling: RopeScaling) -> Float[Tensor, "half"]:
    """Llama 3.1's: short wavelengths stay, long ones grow by `factor`, those between are mixed.

    Of a frequency that turns r times over the trained length, a share s = (r - low) / (high - low) stays, cut to
    [0, 1], and 1 - s is divided by `factor`.
    """
    turns = scaling.n_ctx_trained / (2 * math.pi / plain)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    stays = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - stays) * plain / scaling.factor + stays * plain


def text_rotation(
    position_ids: Int[Tensor, "axis batch pos"],
    d_head: int,
    theta: float,
    mrope_section: tuple[int, ...] | None,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
    lengths: Int[Tensor, "batch"] | None = None,
    interleaved: bool = False,
) -> Rotation:
    """The rotation of text queries and keys.

    With `mrope_section` the frequencies are shared out between the three position axes (temporal,
    height, width) in consecutive chunks or, `interleaved`, in turns from the fastest on, as long as height and width
    have some left; without it the first axis turns all of them. A `scaling` goes by `lengths`, how many positions each
    row has so far (by default one more than the highest here).
    """
    if scaling is None:
        per_position, factor = frequencies(d_head, theta, position_ids.device), 1.0
    else:
        lengths = position_ids[0].amax(-1) + 1 if lengths is None else lengths
        per_position, factor = scaled_frequencies(d_head, theta, scaling, lengths), scaling.attention_factor
    angles = position_ids[..., None].float() * per_position
    if mrope_section is None:
        angles = angles[0]
    elif interleaved:
        turn = torch.arange(d_head // 2, device=angles.device)
        _, n_height, n_width = mrope_section
        by_height, by_width = (turn % 3 == 1) & (turn < 3 * n_height), (turn % 3 == 2) & (turn < 3 * n_width)
        angles = torch.where(by_height, angles[1], torch.where(by_width, angles[2], angles[0]))
    else:
        chunks = angles.split(list(mrope_section), dim=-1)
        angles = torch.cat([chunk[i % 3] for i, chunk in enumerate(chunks)], dim=-1)
    return Rotation.by(angles, factor, dtype)


def patch_rotation(rows_cols: Int[Tensor, "patch 2"], d_head: int, theta: float) -> Rotation:
    """The rotation of image patches: half of the frequencies turn with the row, half with the column."""
    angles = rows_cols[..., None].float() * frequencies(d_head // 2, theta, rows_cols.device)
    return Rotation.by(angles.flatten(-2))


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # it is kept
def patch_places(grid: Grid, merge: int) -> Int[Tensor, "patch 2"]:
    """Row and column of every patch, merge block by merge block, for each temporal slice."""
    t, h, w = grid
    rows, cols = np.indices((h, w))
    blocks = (h // merge, merge, w // merge, merge)
    in_order = [axis.reshape(blocks).transpose(0, 2, 1, 3).ravel() for axis in (rows, cols)]
    return torch.from_numpy(np.tile(np.stack(in_order, axis=-1), (t, 1)))
