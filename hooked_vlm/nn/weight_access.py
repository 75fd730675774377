"""Weights as tensors to read, wherever and however they are kept; tensors that refuse edits.

A weight that is offloaded lies elsewhere between passes, and a quantised one is not stored as the numbers it stands
for. What is read of either is a copy, which refuses edits: they would be lost.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from hooked_vlm.errors import InputError
from hooked_vlm.nn.hooks import foreign_module, is_own, is_touched, own_hook


class ClosedTensor(Tensor):
    """Readable like a tensor, closed to edits, as its views are."""

    why: ClassVar[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        writes = name == "__setitem__" or name in _INPLACE_OPERATORS
        writes = writes or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        for written in (kwargs.get("out"), *((*args, *kwargs.values())[:1] if writes else ())):
            if isinstance(written, ClosedTensor):
                # not a TypeError, which torch takes for "try the other operand" (`b += 1` would then rebind b)
                raise RuntimeError(written.why)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            closed = {
                x.untyped_storage()._cdata: type(x) for x in (*args, *kwargs.values()) if isinstance(x, ClosedTensor)
            }
            if isinstance(result, tuple | list):
                return type(result)(_closed_where_shared(x, closed) for x in result)
            return _closed_where_shared(result, closed)


class AbsentBias(ClosedTensor):
    """Zeros standing for a bias the checkpoint does not have."""

    why = (
        "this layer has no bias in the checkpoint: what reads as zeros is not a parameter and "
        "cannot be edited (model.absent_biases lists them)"
    )


class WeightCopy(ClosedTensor):
    """Copy of a weight that is kept elsewhere or in another form."""

    why = (
        "this weight is offloaded, quantised or parametrised: what is read is a copy, and an edit of it would be lost. "
        "To edit weights load the model without device_map and quantize"
    )


def _closed_where_shared(result: Any, closed: dict[int, type[ClosedTensor]]) -> Any:
    """Views stay closed to edits; everything computed from a closed tensor is an ordinary one."""
    if isinstance(result, Tensor) and (kind := closed.get(result.untyped_storage()._cdata)) is not None:
        return result.as_subclass(kind)
    return result.as_subclass(Tensor) if isinstance(result, ClosedTensor) else result


_INPLACE_OPERATORS = {f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}


@own_hook
def check_unedited(module: nn.Module, _inputs: Any = None) -> None:
    """Refuse a parameter that was edited while it was offloaded: it is an empty tensor then, and the edit is lost.

    Raises:
        RuntimeError: an edit in place of a parameter itself, which is lost.
    """
    if any(p.is_meta and p._version for p in module.parameters(recurse=False)):
        raise RuntimeError(
            f"a parameter was edited in place while it was empty, and the edit is lost: {WeightCopy.why}"
        )


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer does what its weight and bias say: neither wrapped (by an adapter) nor hooked."""
    return isinstance(linear, nn.Linear) and is_own(linear) and not is_touched(linear)


def bias_of(linear: nn.Module, d_in: int) -> Tensor | None:
    """Bias of a linear layer of `d_in` inputs; None if it has none. A hooked or wrapped layer is called on zeros."""
    if not is_plain(linear):
        own = next(linear.parameters())
        return linear(torch.zeros(1, 1, d_in, dtype=own.dtype, device=device_of(linear)))[0, 0]
    return None if linear.bias is None else values_of(linear, "bias")


def values_of(module: nn.Module, name: str = "weight") -> Tensor:
    """A module's own parameter as a plain tensor: the parameter itself, or a `WeightCopy` of what is kept elsewhere
    (on the device that computes) or quantised (dequantised).

    Raises:
        InputError: another module (an adapter, say) stands in the layer's place, so that its weight does not say what
            it computes.
    """
    if is_parametrized(module, name):
        return getattr(module, name).detach().as_subclass(WeightCopy)
    if not is_own(module):
        raise InputError(
            f"{getattr(module, 'name', 'this layer')} is a {type(module).__module__}.{type(module).__name__}, whose "
            f"weight alone does not say what it computes: merge the adapter into a plain nn.Linear (peft: "
            "merge_and_unload()) to read weights"
        )
    return _values(module, name)


def _values(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    if value.device.type == "meta" and has_offloaded_params(module):
        check_unedited(module)
        with align_module_device(module):
            return getattr(module, name).detach().as_subclass(WeightCopy)
    if is_quantised(value):
        return value.detach().dequantize().as_subclass(WeightCopy)
    return value


def sorted_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All of a model's weights by name, one at a time, as `values_of` gives them."""
    for name in sorted(model.state_dict()):
        of, _, own = name.rpartition(".")
        yield name, _values(model.get_submodule(of), own)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is stored in fewer bits than it is used with (`hooked_vlm.loading.quantisation`)."""
    return type(weight).__module__.startswith("torchao.")


def device_of(module: nn.Module) -> torch.device:
    """Device on which a module computes."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    return next(module.parameters()).device


def why_closed(model: nn.Module) -> str:
    """Reason why a model's weights can be neither written, nor moved, nor edited; empty if they can."""
    if foreign := foreign_module(model):
        return f"another module stands at {foreign}; merge adapters into plain layers first"
    kept_elsewhere = any(has_offloaded_params(module) for module in model.modules())
    if kept_elsewhere or any(is_quantised(p) for p in model.parameters()):
        kind = "offloaded" if kept_elsewhere else "quantised"
        return f"they are {kind}; load the model without {'device_map' if kept_elsewhere else 'quantize'} for that"
    return ""


def absent_bias(module: nn.Module, *shape: int) -> Tensor:
    """Zeros of `shape` that refuse edits, in place of a bias that a module does not have."""
    dtype = next(module.parameters()).dtype
    return torch.zeros(shape, device=device_of(module), dtype=dtype).as_subclass(AbsentBias)
