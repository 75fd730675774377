"""Keys and values of positions that were run before, in buffers made once."""

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.weight_access import device_of

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@runtime_checkable
class EarlierKeys(Protocol):
    """Keys and values of the positions before a pass."""

    n_shared: int
    """Number of leading keys shared by all runs for all runs that share a batch."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One layer's new keys and values behind the earlier ones."""
        ...


class KVCache:
    """Rotated keys and values of the positions run so far.

    `capacity` is how many positions fit before the buffers must grow (they then double).
    """

    n_shared = 0

    def __init__(
        self,
        n_layers: int,
        batch: int,
        capacity: int,
        n_key_value_heads: int,
        d_head: int,
        device: torch.device,
        dtype: torch.dtype,
        layer_devices: Sequence[torch.device] | None = None,
    ) -> None:
        """`device` is that of the inputs; a layer's keys and values may lie on another, where the layer computes."""
        shape = (batch, capacity, n_key_value_heads, d_head)
        self.device, homes = device, layer_devices or [device] * n_layers
        self.keys = [torch.empty(shape, device=home, dtype=dtype) for home in homes]
        self.values = [torch.empty(shape, device=home, dtype=dtype) for home in homes]
        self.length = 0
        """Positions filled, the same for every row (padding included)."""
        self.frozen = False
        """Whether later passes leave it as it is."""
        self.n_passes = 0
        """Forward passes that filled them."""
        self.inputs: VLMInputs | None = None
        """Inputs of the first of them."""
        self.next_position: Int[Tensor, "batch"] | None = None
        """The rotary position of each row's next token (images take up fewer positions than tokens)."""
        self._valid: Bool[Tensor, "batch capacity"] | None = None
        """False where a filled position is padding; None as long as none is."""

    @property
    def batch(self) -> int:
        return self.keys[0].shape[0]

    def freeze(self) -> None:
        """Have later passes read the cache and add nothing: one prompt for many continuations."""
        self.frozen = True

    def unfreeze(self) -> None:
        """Have later passes add to the cache again."""
        self.frozen = False

    def begin(self, inputs: VLMInputs) -> VLMInputs:
        """Return the inputs that the cache begins with: these, if it is empty."""
        if self.inputs is None or not self.length:
            self.inputs = inputs
        return self.inputs

    def extend(
        self,
        layer: int,
        k: Float[Tensor, "batch pos kv_head d_head"],
        v: Float[Tensor, "batch pos kv_head d_head"],
    ) -> tuple[Float[Tensor, "batch key kv_head d_head"], Float[Tensor, "batch key kv_head d_head"]]:
        """Put one layer's new keys and values after the filled ones, and return all of them.

        They are written in place, and what comes back are views; where gradients flow they are joined anew.

        `length` moves only with `advance`, so a forward pass that fails half-way leaves the cache as it was.
        """
        if self.frozen:
            keys, values = self.keys[layer][:, : self.length], self.values[layer][:, : self.length]
            return torch.cat((keys, k), dim=1), torch.cat((values, v), dim=1)
        end = self.length + k.shape[1]
        for buffers, new in ((self.keys, k), (self.values, v)):
            if torch.is_grad_enabled() and (new.requires_grad or buffers[layer].requires_grad):
                # a write in place would take from earlier steps what their gradients need
                buffers[layer] = torch.cat((buffers[layer].narrow(1, 0, self.length), new), dim=1)
                continue
            if end > buffers[layer].shape[1]:
                buffers[layer] = _with_room(buffers[layer], self.length, end)
            buffers[layer].narrow(1, self.length, new.shape[1]).copy_(new)
        return self.keys[layer].narrow(1, 0, end), self.values[layer].narrow(1, 0, end)

    def repeat(self, n: int) -> "KVCache":
        """Return another cache, of all rows `n` times, one time after the other."""
        new = copy(self)
        new.frozen = False
        new.keys, new.values = ([buffer.repeat(n, 1, 1, 1) for buffer in own] for own in (self.keys, self.values))
        new.next_position = None if self.next_position is None else self.next_position.repeat(n)
        new._valid = None if self._valid is None else self._valid.repeat(n, 1)
        return new

    def valid_with(self, n_new: int, new_valid: Bool[Tensor, "batch new"] | None) -> Bool[Tensor, "batch key"] | None:
        """Mask of the positions that are not padding, filled ones and `n_new` more; None if all are real.

        `new_valid` is None where none of the new ones is padding.
        """
        if self._valid is None and new_valid is None:
            return None
        end = self.length + n_new
        if self._valid is None:
            self._valid = torch.ones(self.batch, end, dtype=torch.bool, device=self.device)
        self._valid = _with_room(self._valid, self.length, end)
        self._valid[:, self.length : end] = True if new_valid is None else new_valid
        return self._valid[:, :end]

    def advance(self, n_positions: int, n_rotary_positions: Int[Tensor, "batch"] | int) -> None:
        """Count `n_positions` more as filled, whose rotary positions reach `n_rotary_positions` further."""
        if self.frozen:
            return
        self.length += n_positions
        self.n_passes += 1
        past = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        self.next_position = (past if self.next_position is None else self.next_position) + n_rotary_positions


class SharedPrefix:
    """The first positions of a cache, in front of what any number of runs over the same rows go on with.

    A batch holds the rows of one run after those of another; nothing is written into the cache.
    """

    def __init__(self, cache: KVCache, n_positions: int) -> None:
        self.cache, self.n_shared = cache, n_positions

    def extend(
        self,
        layer: int,
        k: Float[Tensor, "rows pos kv_head d_head"],
        v: Float[Tensor, "rows pos kv_head d_head"],
    ) -> tuple[Float[Tensor, "rows key kv_head d_head"], Float[Tensor, "rows key kv_head d_head"]]:
        return self._before(self.cache.keys[layer], k), self._before(self.cache.values[layer], v)

    def _before(self, shared: Tensor, own: Tensor) -> Tensor:
        n = self.n_shared
        out = own.new_empty(len(own), n + own.shape[1], *own.shape[2:])
        out.unflatten(0, (-1, len(shared)))[:, :, :n] = shared[:, :n]
        out[:, n:] = own
        return out


def _with_room(buffer: Tensor, filled: int, end: int) -> Tensor:
    """`buffer` itself if positions up to `end` fit, otherwise a copy of twice the size."""
    if end <= buffer.shape[1]:
        return buffer
    grown = buffer.new_empty(buffer.shape[0], max(end, 2 * filled), *buffer.shape[2:])
    grown[:, :filled] = buffer[:, :filled]
    return grown


def new_kv_cache(model: "HookedVLM", batch: int, capacity: int) -> KVCache:
    """Return an empty key-value cache for `batch` rows with room for `capacity` positions (it grows past that)."""
    cfg = model.cfg
    homes = [device_of(block) for block in model.blocks] if model.device_map else None
    sizes = (cfg.n_layers, batch, capacity, cfg.n_key_value_heads, cfg.d_head)
    return KVCache(*sizes, cfg.device, cfg.dtype, homes)
