"""Values as bytes: codes with one scale for each map, compressed, in a page of bounded size."""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from hooked_vlm.errors import InputError

CLEAR = 255
"""The code of NaN: a token without a value."""
STEPS = (254, 126, 62, 30, 14, 6)
"""Numbers of quantisation steps, finest first; coarser ones are used where the page would grow too large."""
BUDGET = 14_000_000
"""Characters that the values on images may take in the page."""
TEXT_BUDGET = 4_000_000
"""Characters that the values on text may take."""


@dataclass(frozen=True, eq=False)
class Quantised:
    """`(codes - zero) * scales` are the values, each wrong by half a scale at most; `CLEAR` codes are NaN."""

    codes: UInt8[np.ndarray, "*maps token"]
    scales: Float[np.ndarray, "*maps"]
    zero: int
    """The code of 0: the middle if any value is negative."""
    steps: int

    @property
    def values(self) -> Float[np.ndarray, "*maps token"]:
        """The values after quantisation."""
        values = (self.codes.astype(np.float32) - self.zero) * self.scales[..., None]
        return np.where(self.codes == CLEAR, np.float32(np.nan), values)


def quantise(values: Float[np.ndarray, "*maps token"], steps: int = STEPS[0]) -> Quantised:
    """Codes of values. The largest magnitude of each map is met exactly; the rest is off by half its scale at most.

    Raises:
        InputError: an infinite value.
    """
    if np.isinf(values).any():
        raise InputError("infinite values cannot be shown: put NaN where there is no value")
    signed = bool((values < 0).any())
    reach = steps // 2 if signed else steps
    clear = np.isnan(values)
    known = np.where(clear, np.float32(0), values)
    scales = (np.abs(known).max(-1, initial=0.0) / reach).astype(np.float32)
    divisors = np.where(scales > 0, scales, np.float32(1))[..., None]
    zero = reach if signed else 0
    codes = np.clip(np.rint(known / divisors), -zero, reach) + zero
    return Quantised(np.where(clear, CLEAR, codes).astype(np.uint8), scales, zero, steps)


@dataclass(frozen=True, eq=False)
class Packed:
    """One text for each row of the page: scales, shares and codes in zlib and base64."""

    rows: tuple[str, ...]
    zero: int
    error: float
    """The largest error of a value, as a share of its map's largest magnitude."""


def pack(
    values: Float[np.ndarray, "row layer head token"],
    shares: Float[np.ndarray, "row layer head"] | None = None,
    budget: int = BUDGET,
) -> Packed:
    """The finest codes that fit into `budget` characters.

    Args:
        shares: one more number for each map, kept in float32.

    Raises:
        InputError: not even the coarsest codes fit.
    """
    extra = np.zeros(values.shape[:-1], np.float32) if shares is None else shares.astype(np.float32)
    size = 0
    for steps in STEPS:
        quantised = quantise(values, steps)
        rows = _compressed(quantised, extra, budget)
        size = sum(map(len, rows))
        if len(rows) == len(values) and size <= budget:
            reach = steps // 2 if quantised.zero else steps
            return Packed(tuple(rows), quantised.zero, 0.5 / reach)
    raise InputError(
        f"{len(values)} rows of {values.shape[1]} x {values.shape[2]} maps on {values.shape[3]} tokens do not "
        f"fit into {budget / 1e6:.0f} MB: ask for fewer tokens"
    )


def _compressed(quantised: Quantised, extra: Float[np.ndarray, "row layer head"], budget: int) -> list[str]:
    """Rows up to the one that breaks the budget."""
    rows: list[str] = []
    size = 0
    for codes, scales, shares in zip(quantised.codes, quantised.scales, extra, strict=True):
        little = (array.astype("<f4").tobytes() for array in (scales, shares))
        rows.append(encoded(b"".join([*little, codes.tobytes()])))
        size += len(rows[-1])
        if size > budget:
            break
    return rows


def encoded(data: bytes) -> str:
    """zlib, then base64."""
    return base64.b64encode(zlib.compress(data, 6)).decode()


def decoded(text: str, shape: Sequence[int], zero: int) -> tuple[Float[np.ndarray, "*maps token"], np.ndarray]:
    """A row of `Packed` as the page reads it: values [layer, head, token] and shares [layer, head]."""
    data = zlib.decompress(base64.b64decode(text))
    n_maps = int(np.prod(shape[:-1]))
    floats = np.frombuffer(data, "<f4", 2 * n_maps).reshape(2, *shape[:-1])
    codes = np.frombuffer(data, np.uint8, offset=8 * n_maps).reshape(shape)
    return Quantised(codes, floats[0], zero, STEPS[0]).values, floats[1]
