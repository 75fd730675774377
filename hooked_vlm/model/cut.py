"""Positions of the text side that a cache keeps: `pos_slice`, checked against the padding of the inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import Slice, SliceInput

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs

P = ParamSpec("P")
R = TypeVar("R")
PositionSlice = Slice | SliceInput | Literal["last"]
"""TransformerLens' slices, and "last": each row's own last token."""


Spans = tuple[tuple[int, int], ...]
"""First position and one past the last of each row's tokens."""


@dataclass(frozen=True)
class LastOfRows:
    """Each row's own last token, as a slice that keeps an axis of one position."""

    last: tuple[int, ...]
    """Its column in each row."""
    mode: ClassVar[str] = "last"

    def apply(self, tensor: Float[Tensor, "batch ..."], dim: int = 1) -> Float[Tensor, "batch ..."]:
        """Cut the axis `dim` of a tensor whose first axis runs over the rows."""
        by_position = tensor.movedim(dim, 1)
        index = torch.tensor(self.last, device=tensor.device)
        return by_position[torch.arange(len(index), device=tensor.device), index][:, None].movedim(1, dim)


Cut = Slice | LastOfRows


def check_cut(pos_slice: Any) -> None:
    """Refuse what is no position, no sequence of positions, no slice and not "last".

    Raises:
        InputError: names what came.
    """
    given = pos_slice.slice if isinstance(pos_slice, Slice) else pos_slice
    positions = np.asarray([] if given is None or isinstance(given, str | slice | tuple) else given)
    numbers = positions.size == 0 or (positions.ndim < 2 and positions.dtype.kind in "iu")
    if not numbers or (isinstance(given, str) and given != "last"):
        raise InputError(f'pos_slice is a position, several, a slice or "last", got {pos_slice!r}')


def cut_of(pos_slice: Any, spans: Spans, width: int) -> Cut:
    """Return `pos_slice` as a slice of the `width` positions of inputs whose rows' tokens lie at `spans`.

    Raises:
        InputError: it lies outside of the inputs, or is a position that is padding in one of the rows.
    """
    check_cut(pos_slice)
    if isinstance(pos_slice, str):
        return LastOfRows(tuple(stop - 1 for _, stop in spans))
    cut = Slice.unwrap(pos_slice)
    for given in {"int": [cut.slice], "array": cut.slice}.get(cut.mode, []):
        if not -width <= int(given) < width:
            raise InputError(f"pos_slice={pos_slice} lies outside of the {width} positions of these inputs")
        padded = [row for row, span in enumerate(spans) if int(given) % width not in range(*span)]
        if padded:
            raise InputError(
                f"pos_slice={pos_slice}: position {int(given)} is padding in row {padded[0]}; each row's own last "
                'token is pos_slice="last" of run_with_cache'
            )
    return cut


def cut_of_step(pos_slice: Any) -> Cut:
    """Return the slice of a step of generation, which has one position.

    Raises:
        InputError: `pos_slice` names others.
    """
    if not (pos_slice is None or (isinstance(pos_slice, str | int) and pos_slice in ("last", -1))):
        raise InputError(f'a step of generation has its newest position only: pos_slice="last", not {pos_slice!r}')
    return Slice.unwrap(-1)


def spans_of(inputs: VLMInputs) -> Spans:
    """Where the tokens of each row lie between its padding."""
    return tuple(zip(inputs.first, inputs.stop, strict=True))


def at_real_positions(method: Callable[P, R]) -> Callable[P, R]:
    """Have a decomposition refuse a `pos_slice` that falls on padding."""

    @wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature(method).bind(*args, **kwargs).arguments
        cache, pos_slice = given["self"], given.get("pos_slice")
        if isinstance(pos_slice, str):
            raise InputError(f"pos_slice={pos_slice!r} is one of run_with_cache, after which a cache holds these alone")
        if (spans := cache._spans()) is not None and not cache._cut:
            cut_of(pos_slice, *spans)
        return method(*args, **kwargs)

    return checked
