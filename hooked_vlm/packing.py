"""Rows of different lengths without their padding: linear work on packed positions, hooks on padded rows.

`[position, ...]` of all rows one after the other is what layers see. A hook sees `[row, longest, ...]`, zero where a
row has no position; where all rows have one length that is a view of the same memory. The fused kernel runs on
groups of rows of similar length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.attention import Attention, AttentionCall, AttentionRun, fused_attention
from hooked_vlm.hooks import HookPoint, is_hooked
from hooked_vlm.kv_cache import EarlierKeys
from hooked_vlm.masks import AttentionMask
from hooked_vlm.rotary import Rotation

SIMILAR = 0.8
"""Rows attend together if each has at least this share of the longest one's positions."""


class PackedRun(AttentionRun):
    """A pass over packed positions of rows with `lengths` positions each, `width` wide with their padding."""

    def __init__(
        self,
        lengths: Sequence[int],
        mask: AttentionMask,
        device: torch.device,
        rotate: Rotation | None = None,
        past: EarlierKeys | None = None,
        use_attn_result: bool = False,
        told: Mapping[str, Any] | None = None,
        starts: Sequence[int] | None = None,
        width: int | None = None,
    ) -> None:
        """`starts` are the columns of the rows' first positions (0 by default). `mask` is that of padded rows."""
        super().__init__(mask, rotate, past, use_attn_result, told or {})
        self.lengths, self.width = tuple(lengths), width or max(lengths)
        self.slots: Int[Tensor, "position"] | None = None
        """Where each packed position lies among the padded ones; None where nothing is padded."""
        if min(lengths) != self.width:
            first = np.zeros(len(lengths), dtype=int) if starts is None else np.array(starts)
            columns = [start + np.arange(n) for start, n in zip(first, lengths, strict=True)]
            slots = np.concatenate([row * self.width + own for row, own in enumerate(columns)])
            self.slots = torch.from_numpy(slots).to(device)
        self.groups = _groups(self.lengths, device)

    def _moved(self, device: torch.device) -> "AttentionRun":
        moved = super()._moved(device)
        assert isinstance(moved, PackedRun)
        moved.slots = None if self.slots is None else self.slots.to(device)
        moved.groups = [group.to(device) for group in self.groups]
        return moved

    def pad(self, packed: Float[Tensor, "position *rest"]) -> Float[Tensor, "row width *rest"]:
        shape = (len(self.lengths), self.width, *packed.shape[1:])
        if self.slots is None:
            return packed.view(shape)
        flat = packed.new_zeros(shape[0] * shape[1], *shape[2:])
        return flat.index_copy(0, self.slots, packed).view(shape)

    def pack(self, padded: Float[Tensor, "row width *rest"]) -> Float[Tensor, "position *rest"]:
        flat = padded.flatten(0, 1)
        return flat if self.slots is None else flat[self.slots]

    @property
    def packs(self) -> bool:
        return True

    def hook(self, point: HookPoint, x: Tensor) -> Tensor:
        if not is_hooked(point):
            return x
        seen = self.pad(x)
        tracked = not (seen.is_inference() or seen.requires_grad)  # a hook may ask `seen` for its gradient
        version = seen._version if tracked else -1
        out = self.call(point, seen)
        if tracked and out is seen and seen._version == version and not out.requires_grad:
            return x  # only looked at
        return self.pack(out)

    def attend(self, attn: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        explicit = is_hooked(attn.hook_attn_scores) or is_hooked(attn.hook_pattern)
        if explicit or self.past is not None or self.mask.limits(self.width):
            return self.pack(super().attend(attn, layer, self.pad(q), self.pad(k), self.pad(v)))
        z = torch.empty_like(q) if len(self.groups) > 1 else None
        for group in self.groups:
            own = fused_attention(group.take(q), group.take(k), group.take(v), group.mask(self.mask.causal))
            z = group.put(z, own)
        assert z is not None
        if not is_hooked(attn.hook_z):
            return z
        return self.pack(
            self.hook_z(attn, self.pad(z), AttentionCall(self.pad(q), self.pad(k), self.pad(v), self.mask))
        )


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows that attend together, from their first positions on, the shorter ones with spare positions at the end."""

    n_rows: int
    longest: int
    first: int
    """Where its positions begin among the packed ones, if it is a whole run of them (`slots` is None then)."""
    slots: Int[Tensor, "spot"] | None = None
    """Which packed position each spot holds; a spare spot holds any."""
    real: Int[Tensor, "position"] | None = None
    """Spots that are not spare; None if none is."""

    def to(self, device: torch.device) -> "_Group":
        slots, real = (None if x is None else x.to(device) for x in (self.slots, self.real))
        return replace(self, slots=slots, real=real)

    def take(self, packed: Float[Tensor, "position *rest"]) -> Float[Tensor, "row longest *rest"]:
        n = self.n_rows * self.longest
        own = packed[self.first : self.first + n] if self.slots is None else packed[self.slots]
        return own.unflatten(0, (self.n_rows, self.longest))

    def put(self, out: Tensor | None, z: Float[Tensor, "row longest *rest"]) -> Tensor:
        """`out` with this group's positions written; `z` itself where they are all there are."""
        flat = z.flatten(0, 1)
        if out is None and self.slots is None:
            return flat
        if out is None:
            out = flat.new_empty(len(flat) if self.real is None else len(self.real), *flat.shape[1:])
        if self.slots is None:
            out[self.first : self.first + len(flat)] = flat
        else:
            real = slice(None) if self.real is None else self.real
            out = out.index_copy(0, self.slots[real], flat[real])
        return out

    def mask(self, causal: bool) -> AttentionMask:
        """Spare positions lie in the future of all others; without a causal mask they must be hidden."""
        if causal or self.real is None:
            return AttentionMask(causal)
        valid = torch.zeros(self.n_rows * self.longest, dtype=torch.bool, device=self.real.device)
        return AttentionMask(False, valid.index_fill(0, self.real, True).view(self.n_rows, self.longest))


def _groups(lengths: tuple[int, ...], device: torch.device) -> list[_Group]:
    begins = np.concatenate(([0], np.cumsum(lengths)))
    members: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if members and lengths[row] >= SIMILAR * lengths[members[-1][0]]:
            members[-1].append(row)
        else:
            members.append([row])
    groups = []
    for rows in members:
        longest = lengths[rows[0]]
        rows.sort()
        alike = all(lengths[row] == longest for row in rows)
        if alike and rows == list(range(rows[0], rows[0] + len(rows))):
            groups.append(_Group(len(rows), longest, int(begins[rows[0]])))
            continue
        at = np.arange(longest)
        spots = np.stack([begins[row] + np.minimum(at, lengths[row] - 1) for row in rows])
        real = np.flatnonzero(np.stack([at < lengths[row] for row in rows]))
        to = torch.from_numpy(spots.ravel()).to(device)
        groups.append(_Group(len(rows), longest, 0, to, None if alike else torch.from_numpy(real).to(device)))
    return groups
