"""Renaming a checkpoint's tensors to the model's names and back, by a table, as views wherever possible."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Shaped
from torch import Tensor

from hooked_vlm.converters.checkpoint import listed
from hooked_vlm.converters.errors import CheckpointError
from hooked_vlm.converters.fields import DTYPES


@dataclass(frozen=True)
class Rename:
    """One tensor of the checkpoint and what it becomes.

    With several names in `ours`, the first axis is cut into that many equal parts (fused projections). `flat`
    makes a matrix of a convolution kernel whose stride is its size: [out, in, ...] becomes [out, in * ...].
    """

    theirs: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    """In the checkpoint."""
    flat: bool = False

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Of each tensor in `ours`."""
        first, *rest = self.shape
        return (first // len(self.ours), *([prod(rest)] if self.flat else rest))

    def forward(self, tensor: Shaped[Tensor, "out *rest"]) -> tuple[Tensor, ...]:
        """[out, ...] in the checkpoint to one tensor for each name in `ours`: views of a contiguous one."""
        matrix = tensor.flatten(1) if self.flat else tensor
        return matrix.chunk(len(self.ours)) if len(self.ours) > 1 else (matrix,)

    def backward(self, parts: Sequence[Tensor]) -> Shaped[Tensor, "out *rest"]:
        """The inverse; copies only where several tensors become one."""
        return (torch.cat(list(parts)) if len(parts) > 1 else parts[0]).reshape(self.shape)


def to_ours(
    tensors: Mapping[str, Tensor], table: Iterable[Rename], problems: "Problems"
) -> dict[str, Tensor]:
    """The model's tensors. What does not fit the table is added to `problems` and left out."""
    table = list(table)
    problems.check(tensors, {entry.theirs: entry.shape for entry in table})
    return {
        ours: part
        for entry in table
        if entry.theirs not in problems.names
        for ours, part in zip(entry.ours, entry.forward(tensors[entry.theirs].detach()), strict=True)
    }


def to_theirs(
    tensors: Mapping[str, Tensor], table: Iterable[Rename], problems: "Problems", rename: Callable[[str], str]
) -> dict[str, Tensor]:
    """The checkpoint's tensors, under `rename` of the names in the table."""
    table = list(table)
    problems.check(tensors, {ours: entry.our_shape for entry in table for ours in entry.ours})
    return {
        rename(entry.theirs): entry.backward([tensors[ours].detach() for ours in entry.ours])
        for entry in table
        if not problems.names.intersection(entry.ours)
    }


class Problems:
    """Collects everything wrong with a set of tensors, to be raised as one error."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []
        self.others: list[str] = []
        self.names: set[str] = set()
        """Every expected name that is missing or misshapen."""

    def check(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compares names, shapes and dtypes with what is expected."""
        self.missing += [name for name in shapes if name not in tensors]
        self.unexpected += [name for name in tensors if name not in shapes]
        self.names.update(self.missing)
        for name, shape in shapes.items():
            if name not in tensors:
                continue
            tensor = tensors[name]
            if tuple(tensor.shape) != shape:
                self.misshapen.append(f"{name} (expected {list(shape)}, got {list(tensor.shape)})")
                self.names.add(name)
            elif tensor.dtype not in DTYPES.values():
                self.misshapen.append(f"{name} (expected one of {', '.join(DTYPES)}, got {tensor.dtype})")
                self.names.add(name)

    def raise_any(self, what: str) -> None:
        """
        Raises:
            CheckpointError: if anything was found; it lists all of it (at most 20 names of each kind).
        """
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "wrong shape or dtype": self.misshapen,
            "contradictory": self.others,
        }
        found = [f"{kind}: {listed(items)}" for kind, items in kinds.items() if items]
        if found:
            raise CheckpointError(f"{what}; " + "; ".join(found))
