"""Rows of different lengths without their padding: [position, ...] of all rows one after the other.

Linear work then does nothing for padding. The fused kernel runs on groups of rows of similar length
(`attention.grouped_attention`), and on windows of equal size where rows are cut into windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.inputs.token_layout import Grid
from hooked_vlm.nn.masks import AttentionMask
from hooked_vlm.nn.rotary import patch_places

SIMILAR = 0.8
"""Rows attend together if each has at least this share of the longest one's positions."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Index between packed positions, [position, ...], and padded rows, [row, width, ...]."""

    lengths: tuple[int, ...]
    width: int
    slots: Int[Tensor, "position"] | None
    """Index of each packed position into the flattened padded ones; None where nothing is padded."""

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device,
        starts: Sequence[int] | None = None,
        width: int | None = None,
    ) -> "Packing":
        """`starts` are the columns of the rows' first positions (0 by default), `width` that of the padded rows."""
        width = width or max(lengths)
        slots = None
        if min(lengths) != width:
            first = np.zeros(len(lengths), dtype=int) if starts is None else np.array(starts)
            columns = [start + np.arange(n) for start, n in zip(first, lengths, strict=True)]
            flat = np.concatenate([row * width + own for row, own in enumerate(columns)])
            slots = torch.from_numpy(flat).to(device)
        return cls(tuple(lengths), width, slots)

    def to(self, device: torch.device) -> "Packing":
        return self if self.slots is None or self.slots.device == device else replace(self, slots=self.slots.to(device))

    @cached_property
    def groups(self) -> "tuple[Group, ...]":
        """Rows that attend together."""
        device = torch.device("cpu") if self.slots is None else self.slots.device
        return _groups(self.lengths, np.arange(sum(self.lengths)), device, SIMILAR)

    def pad(self, packed: Float[Tensor, "position *rest"]) -> Float[Tensor, "row width *rest"]:
        """Rows with their padding, which is zero; a view where there is none."""
        shape = (len(self.lengths), self.width, *packed.shape[1:])
        if self.slots is None:
            return packed.view(shape)
        flat = packed.new_zeros(shape[0] * shape[1], *shape[2:])
        return flat.index_copy(0, self.slots, packed).view(shape)

    def pack(self, padded: Float[Tensor, "row width *rest"]) -> Float[Tensor, "position *rest"]:
        """Rows without their padding."""
        flat = padded.flatten(0, 1)
        return flat if self.slots is None else flat[self.slots]


@dataclass(frozen=True, eq=False)
class Windows:
    """Positions in windows, within which they attend: shorter rows whose positions do not lie side by side."""

    numbers: Int[np.ndarray, "position"]
    """The window of each position, from 0; -1 for padding."""
    device: torch.device

    def to(self, device: torch.device) -> "Windows":
        return self if self.device == device else replace(self, device=device)

    @cached_property
    def groups(self) -> "tuple[Group, ...]":
        """Windows of equal size, which attend together."""
        lengths = np.bincount(self.numbers[self.numbers >= 0])
        window_by_window = self.numbers.argsort(kind="stable")[(self.numbers < 0).sum() :]
        return _groups(tuple(lengths.tolist()), window_by_window, self.device, 1.0)


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that attend together, from their first positions on, the shorter ones with spare positions at the end."""

    n_rows: int
    longest: int
    first: int
    """Where its positions begin among the packed ones, if it is a whole run of them (`slots` is None then)."""
    slots: Int[Tensor, "spot"] | None = None
    """Which packed position each spot holds; a spare spot holds any."""
    real: Int[Tensor, "position"] | None = None
    """Spots that are not spare; None if none is."""

    @property
    def n_positions(self) -> int:
        """Positions that it holds, spare ones not counted."""
        return self.n_rows * self.longest if self.real is None else len(self.real)

    def take(self, packed: Float[Tensor, "position *rest"]) -> Float[Tensor, "row longest *rest"]:
        n = self.n_rows * self.longest
        own = packed[self.first : self.first + n] if self.slots is None else packed[self.slots]
        return own.unflatten(0, (self.n_rows, self.longest))

    def put(
        self, out: Float[Tensor, "position *rest"], z: Float[Tensor, "row longest *rest"]
    ) -> Float[Tensor, "position *rest"]:
        """`out` with this group's positions written."""
        flat = z.flatten(0, 1)
        if self.slots is None:
            out[self.first : self.first + len(flat)] = flat
            return out
        real = slice(None) if self.real is None else self.real
        return out.index_copy(0, self.slots[real], flat[real])

    def mask(self, causal: bool) -> AttentionMask:
        """Spare positions lie in the future of all others; without a causal mask they must be hidden."""
        if causal or self.real is None:
            return AttentionMask(causal)
        valid = torch.zeros(self.n_rows * self.longest, dtype=torch.bool, device=self.real.device)
        return AttentionMask(False, valid.index_fill(0, self.real, True).view(self.n_rows, self.longest))


def _groups(
    lengths: tuple[int, ...], positions: Int[np.ndarray, "position"], device: torch.device, similar: float
) -> tuple[Group, ...]:
    """Rows in groups of which each has at least the share `similar` of the longest one's positions.

    `positions` are those of all rows, one row after the other.
    """
    begins = np.concatenate(([0], np.cumsum(lengths)))
    members: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if members and lengths[row] >= similar * lengths[members[-1][0]]:
            members[-1].append(row)
        else:
            members.append([row])
    groups = []
    for rows in members:
        longest = lengths[rows[0]]
        rows.sort()
        alike = all(lengths[row] == longest for row in rows)
        at = np.arange(longest)
        spots = positions[np.stack([begins[row] + np.minimum(at, lengths[row] - 1) for row in rows])].ravel()
        if alike and np.array_equal(spots, spots[0] + np.arange(len(spots))):
            groups.append(Group(len(rows), longest, int(spots[0])))
            continue
        real = np.flatnonzero(np.stack([at < lengths[row] for row in rows]))
        to = torch.from_numpy(spots).to(device)
        groups.append(Group(len(rows), longest, 0, to, None if alike else torch.from_numpy(real).to(device)))
    return tuple(groups)


@lru_cache(maxsize=256)
def window_numbers(grid: Grid, merge: int, side: int) -> Int[np.ndarray, "patch"]:
    """Number of the window of every patch, merge block by merge block; windows begin at the top left, the last row and
    column of them may be smaller."""
    rows, cols = patch_places(grid, merge).numpy().T // side
    return rows * (cols.max() + 1) + cols
