"""Two more devices for a machine without any: every tensor has a place, and operations across places are refused.

A tensor's storage is real CPU memory; which device it pretends to be on is noted beside it. Results are therefore
those of the CPU, bit for bit, and a tensor left on the wrong device is an error as it is between two GPUs.
Gradients are not followed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FIRST, SECOND = torch.device("privateuseone:0"), torch.device("privateuseone:1")

# What may read from another device: copies; an index tensor on the CPU; a number on the CPU.
_COPIES = {"copy_", "to"}
_INDEXING = {"__getitem__", "__setitem__"}
_ON_THE_CPU_ONLY = {"numpy", "__array__"}


class PretendDevices(TorchFunctionMode):
    """While it is active, `FIRST` and `SECOND` can be used like devices."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[int, torch.device] = {}
        self.kept: list[Any] = []  # storages stay alive: an address must not come to mean another tensor
        self.moves = 0

    def place(self, x: Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            return self.places.get(x.untyped_storage()._cdata, x.device)

    def put(self, x: Tensor, place: torch.device) -> None:
        with torch._C.DisableTorchFunction():
            storage = x.untyped_storage()
        if storage._cdata not in self.places:
            self.places[storage._cdata] = place
            self.kept.append(storage)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.place(args[0])
        if func == Tensor.to:
            return self._to(*args, **kwargs)
        if func == Tensor.cpu:
            return self._to(args[0], "cpu")
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "privateuseone":
            kwargs["device"] = "cpu"
        given = [*_tensors(args), *_tensors(kwargs)]
        operands = given[:1] if name in _COPIES else given
        if name in _INDEXING:  # indices may lie on the CPU
            index = list(_tensors(args[1]))
            operands = [x for x in given if not any(x is i and self.place(i).type == "cpu" for i in index)]
        places = {self.place(x) for x in operands if x.ndim or self.place(x).type != "cpu"}
        places.discard(torch.device("meta"))
        if len(places) > 1 or (name in _ON_THE_CPU_ONLY and places - {torch.device("cpu")}):
            raise RuntimeError(f"{name} across devices: {sorted(map(str, places))}")
        here = next(iter(places), torch.device("cpu"))
        out = func(*args, **kwargs)
        made_on = torch.device(wanted) if wanted is not None else here
        if made_on.type == "privateuseone":
            for x in _tensors(out):
                self.put(x, made_on)
        return out

    def _to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked = [*args, *kwargs.values()]
        like = next((a for a in asked if isinstance(a, Tensor)), None)
        devices = [torch.device(a) for a in asked if isinstance(a, str | torch.device)]
        dtypes = [a for a in asked if isinstance(a, torch.dtype)]
        if like is not None:
            devices, dtypes = [self.place(like)], [like.dtype]
        target = devices[0] if devices else self.place(x)
        with torch._C.DisableTorchFunction():
            out = x.to(dtypes[0]) if dtypes else x
            if target == self.place(x):
                if out is not x and target.type == "privateuseone":
                    self.put(out, target)
                return out
            self.moves += 1
            if "meta" in (target.type, x.device.type):
                return out.to("meta")
            out = out.clone() if out is x else out
            if target.type == "privateuseone":
                self.put(out, target)
            return out

    def __enter__(self) -> "PretendDevices":
        super().__enter__()
        return self


def _tensors(found: Any) -> Iterator[Tensor]:
    """All tensors in what a function takes or gives."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        yield from (x for value in found.values() for x in _tensors(value))
    elif isinstance(found, list | tuple):
        yield from (x for value in found for x in _tensors(value))
