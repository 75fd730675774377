"""Digests of values that a result depends on (for a model's weights: `hooked_vlm.model.fingerprints.weights_hash`)."""

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_vlm.errors import InputError

_PLAIN = (bool, int, float, complex, str, bytes, range, Enum, PurePath, np.generic, torch.dtype, torch.device)
"""Types whose `repr` is unambiguous."""


def digest(value: Any) -> str:
    """Digest of a value's content: equal for equal content, in every process and on every device.

    Plain values, tensors, arrays, containers, and dataclasses of these (interventions, metrics, inputs). The digest
    of a dataclass of your own includes its source text, but not the functions it calls; fields that are not compared
    are left out.

    A value with a property `known_as` that is not None is known by it: the name and the version that a user gave to
    what cannot be compared.

    Raises:
        InputError: a value without comparable content, such as a function or an object of another class.
    """
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()[:32]


def _feed(found: Any, value: Any) -> None:
    kind: Any = type(value)
    found.update(f"{kind.__module__}.{kind.__qualname__}(".encode())
    if (known := getattr(value, "known_as", None)) is not None:
        _feed(found, known)
    elif value is None or isinstance(value, _PLAIN):
        found.update(repr(value).encode())
    elif isinstance(value, Tensor):
        found.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        found.update(f"{value.dtype} {value.shape} ".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(found, item)
    elif isinstance(value, set | frozenset):
        found.update(" ".join(sorted(map(digest, value))).encode())
    elif isinstance(value, Mapping):
        found.update(" ".join(sorted(digest(item) for item in value.items())).encode())
    elif _is_own_dataclass(kind):
        if not kind.__module__.startswith("hooked_vlm."):
            found.update(_source(kind).encode())
        for field in fields(kind):
            if field.init and field.compare:
                found.update(f"{field.name}=".encode())
                _feed(found, getattr(value, field.name))
    else:
        raise InputError(
            f"{_shown(value)} cannot be identified by its content, so results cannot be stored under it: give a "
            "dataclass on the top level of a module (interventions and metrics of this package are such), or a name "
            'and a version that you change with it: CustomHooks(hooks, label="mine", version=1), or '
            'Named(function, "mine", version=1) of hooked_vlm.metrics'
        )
    found.update(b")")


def _is_own_dataclass(kind: type) -> bool:
    """Whether a class is itself a dataclass (a subclass may hold more than fields) and not defined in a function."""
    return is_dataclass(kind) and "__dataclass_fields__" in vars(kind) and "<locals>" not in kind.__qualname__


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed at a prompt: its name and fields are all there is
        return ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__qualname__}"
