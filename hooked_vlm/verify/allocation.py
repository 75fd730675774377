"""Bytes of tensors that are alive while code runs, on any device including the meta device."""

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Allocations(TorchDispatchMode):
    """Count the storages that operations allocate and free.

        with Allocations() as made:
            model(inputs)
        made.peak  # bytes, at the moment when they were most

    What existed before (weights, inputs) does not count, nor does what a kernel uses inside. The same numbers come
    out on every device that runs the same operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        """Bytes of storages allocated and not yet freed."""
        self.peak = 0
        """Bytes, the largest `alive`."""
        self._made: set[int] = set()
        self._given: dict[int, UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tree_map_only(Tensor, self._given_before, (args, kwargs))
        out = func(*args, **kwargs)
        tree_map_only(Tensor, self._count, out)
        return out

    def _given_before(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._made:
            self._given[storage._cdata] = storage  # kept, so that no new storage gets its address

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._made or address in self._given:
            return
        self._made.add(address)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, address, size).atexit = False

    def _free(self, address: int, size: int) -> None:
        self._made.discard(address)
        self.alive -= size
