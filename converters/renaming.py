"""Rename a checkpoint's tensors to the model's names and back, by a table, as views wherever possible."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from hooked_vlm.converters.checkpoint import listed, same_values
from hooked_vlm.converters.fields import DTYPES
from hooked_vlm.converters.foreign import needless, reasons
from hooked_vlm.errors import CheckpointError

EMBED, UNEMBED = "embed.weight", "unembed.weight"


@dataclass(frozen=True)
class Rename:
    """One tensor of the checkpoint and its counterparts in the model.

    With several names in `ours`, the first axis is split among them (fused projections): into equal parts, or into
    `parts` rows each. Where the checkpoint interleaves them, it does so `groups` times, and `parts` are the
    rows of one group. `flat` turns a convolution kernel whose stride is its size into a matrix: [out, in, ...]
    becomes [out, in * ...]. `transposed`: the checkpoint keeps a matrix as [in, out]. `lead` is the number of axes of
    length 1 that the model has in front.
    """

    theirs: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    """The shape in the checkpoint."""
    flat: bool = False
    transposed: bool = False
    lead: int = 0
    parts: tuple[int, ...] = ()
    groups: int = 1

    @property
    def our_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape in the model of each tensor in `ours`."""
        if self.transposed:
            return {self.ours[0]: self.shape[::-1]}
        rest = [prod(self.shape[1:])] if self.flat else list(self.shape[1:])
        ones = (1,) * self.lead
        return {name: (*ones, self.groups * n, *rest) for name, n in zip(self.ours, self._rows, strict=True)}

    @property
    def _rows(self) -> tuple[int, ...]:
        """Rows of each part in one group."""
        return self.parts or (self.shape[0] // len(self.ours),) * len(self.ours)

    def forward(self, tensor: Shaped[Tensor, "out *rest"]) -> tuple[Tensor, ...]:
        """Split the checkpoint's tensor [out, ...] into one for each name in `ours`.

        The parts are views of a contiguous tensor, or copies where they are interleaved.
        """
        if self.transposed:
            return (tensor.T,)
        matrix = tensor.flatten(1) if self.flat else tensor
        if len(self.ours) == 1:
            return (matrix.view(*[1] * self.lead, *matrix.shape) if self.lead else matrix,)
        if self.groups == 1:
            return matrix.split(list(self._rows))
        grouped = matrix.unflatten(0, (self.groups, -1))
        return tuple(part.flatten(0, 1) for part in grouped.split(list(self._rows), dim=1))

    def backward(self, parts: Sequence[Tensor]) -> Shaped[Tensor, "out *rest"]:
        """The inverse; copies only where several tensors become one."""
        if self.transposed:
            return parts[0].T.contiguous()
        if len(parts) == 1:
            return parts[0].reshape(self.shape)
        grouped = [part.unflatten(0, (self.groups, -1)) for part in parts]
        return torch.cat(grouped, dim=1).reshape(self.shape)


def to_ours(tensors: Mapping[str, Tensor], table: Iterable[Rename], problems: "Problems") -> dict[str, Tensor]:
    """The model's tensors from the checkpoint's; misfits are added to `problems` and left out."""
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
    """The checkpoint's tensors from the model's, with `rename` applied to the names in the table."""
    table = list(table)
    problems.check(tensors, {name: shape for entry in table for name, shape in entry.our_shapes.items()})
    return {
        rename(entry.theirs): entry.backward([tensors[ours].detach() for ours in entry.ours])
        for entry in table
        if not problems.names.intersection(entry.ours)
    }


def tied_to_ours(
    tensors: Mapping[str, Tensor],
    table: Iterable[Rename],
    cfg: Mapping[str, Any],
    embed_and_head: tuple[str, str],
    rename: Callable[[str], str] = str,
    notes: list[str] | None = None,
) -> dict[str, Tensor]:
    """`to_ours`; where the output matrix is tied, `unembed.weight` is the same object as `embed.weight`.

    Args:
        embed_and_head: the checkpoint's names of the two matrices.
        rename: from the names in the checkpoint to those in the table.
        notes: gains what was left out because it cannot change a number; what is already there goes into the error.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or contradict `tie_word_embeddings`.
    """
    problems, notes, table = Problems(), [] if notes is None else notes, list(table)
    hf_embed, hf_head = embed_and_head
    expected = {entry.theirs for entry in table} | ({hf_head} if cfg["tie_word_embeddings"] else set())
    theirs = _by_name_in_table(tensors, expected, rename, problems, notes)
    head = theirs.pop(hf_head, None) if cfg["tie_word_embeddings"] else None
    ours = to_ours(theirs, table, problems)
    problems.reasons = reasons(problems.unexpected, expected, rename)
    if cfg["tie_word_embeddings"] and EMBED in ours:
        if head is not None and not same_values(head, ours[EMBED]):
            problems.others.append(f"tie_word_embeddings is true, but {hf_head} differs from {hf_embed}")
        ours[UNEMBED] = ours[EMBED]
    _explain_missing_head(problems, hf_head, cfg)
    problems.raise_any("the checkpoint's tensors do not match its config.json", notes)
    return ours


def _by_name_in_table(
    tensors: Mapping[str, Tensor],
    expected: Collection[str],
    rename: Callable[[str], str],
    problems: "Problems",
    notes: list[str],
) -> dict[str, Tensor]:
    """The checkpoint's tensors under the table's names, without those that cannot change a number."""
    theirs: dict[str, Tensor] = {}
    left_out: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        renamed = rename(name)
        if renamed not in expected:
            if (kind := needless(name)) is not None:
                left_out.setdefault(kind, []).append(name)
            else:
                theirs[name] = tensor
        elif renamed not in theirs:
            theirs[renamed] = tensor
        elif same_values(tensor, theirs[renamed]):
            left_out.setdefault("the same tensor under a second name", []).append(name)
        else:
            problems.others.append(f"{renamed} appears under two names, with different values")
    notes += [f"{listed(names, most=3)} ({kind}) left out" for kind, names in left_out.items()]
    return theirs


def tied_to_theirs(
    tensors: Mapping[str, Tensor],
    table: Iterable[Rename],
    cfg: Mapping[str, Any],
    rename: Callable[[str], str] = str,
) -> dict[str, Tensor]:
    """`to_theirs`, without the output matrix where it is tied.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or `unembed.weight` is no longer tied.
    """
    problems = Problems()
    tensors = dict(tensors)
    head = tensors.pop(UNEMBED, None) if cfg["tie_word_embeddings"] else None
    if head is not None and EMBED in tensors and not same_values(head, tensors[EMBED]):
        problems.others.append(f"tie_word_embeddings is true, but {UNEMBED} differs from {EMBED}")
    theirs = to_theirs(tensors, table, problems, rename)
    _explain_missing_head(problems, UNEMBED, cfg)
    problems.raise_any("the model's tensors do not match the configuration")
    return theirs


def affine(theirs: str, ours: tuple[str, ...], shape: tuple[int, ...]) -> list[Rename]:
    """A weight and its bias, one number per row."""
    return [
        Rename(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), shape),
        Rename(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours), shape[:1]),
    ]


def _explain_missing_head(problems: "Problems", name: str, cfg: Mapping[str, Any]) -> None:
    if name in problems.missing and not cfg["tie_word_embeddings"]:
        problems.missing.remove(name)
        problems.missing.insert(0, f"{name} (config.json has no tie_word_embeddings: true)")


class Problems:
    """A collection of everything wrong with a set of tensors, raised as one error."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []
        self.others: list[str] = []
        self.reasons: list[str] = []
        """Why tensors are missing and others unexpected, where that is known."""
        self.names: set[str] = set()
        """Every expected name that is missing or misshapen."""

    def check(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names, shapes and dtypes with the expected ones."""
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
                self.misshapen.append(f"{name} (expected one of {', '.join(DTYPES)}, got {tensor.dtype}: quantised?)")
                self.names.add(name)

    def raise_any(self, summary: str, notes: Sequence[str] = ()) -> None:
        """Raise one error that begins with `summary` if there are problems, and ends with `notes`.

        Raises:
            CheckpointError: all problems (at most 20 names of each kind); reasons instead of the names that are
                missing and unexpected, where they are known.
        """
        kinds = {
            "missing": [] if self.reasons else self.missing,
            "unexpected": [] if self.reasons else self.unexpected,
            "wrong shape or dtype": self.misshapen,
            "contradictory": self.others,
        }
        problems = self.reasons + [f"{kind}: {listed(items)}" for kind, items in kinds.items() if items]
        if problems:
            raise CheckpointError(f"{summary}; " + "; ".join([*problems, *notes]))
