"""Positions of the text side that a cache keeps: `pos_slice`, checked against the padding of the inputs."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import Slice, SliceInput

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs

PositionSlice = Slice | SliceInput | Literal["last"]
"""TransformerLens' slices, and "last": each row's own last token."""


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


def cut_of(pos_slice: Any, inputs: VLMInputs) -> Cut:
    """Return `pos_slice` as a slice of these inputs' positions.

    Raises:
        InputError: it lies outside of the inputs, or is a position that is padding in one of the rows.
    """
    if isinstance(pos_slice, str):
        if pos_slice != "last":
            raise InputError(f'pos_slice is a position, several, a slice or "last", got {pos_slice!r}')
        return LastOfRows(tuple(stop - 1 for stop in inputs.stop))
    cut, width = Slice.unwrap(pos_slice), inputs.shape[1]
    for given in {"int": [cut.slice], "array": cut.slice}.get(cut.mode, []):
        if not -width <= int(given) < width:
            raise InputError(f"pos_slice={pos_slice} lies outside of the {width} positions of these inputs")
        at = int(given) % width
        padded = [row for row, span in enumerate(zip(inputs.first, inputs.stop, strict=True)) if at not in range(*span)]
        if padded:
            raise InputError(
                f"pos_slice={pos_slice}: position {int(given)} is padding in row {padded[0]}; each row's own last "
                'token is pos_slice="last" of run_with_cache'
            )
    return cut


def cut_of_pass(pos_slice: Any, inputs: VLMInputs, n_positions: int) -> Cut:
    """`cut_of` for a tensor of a pass over these inputs, or of a later step of generation."""
    if pos_slice is None or n_positions == inputs.shape[1]:
        return cut_of(pos_slice, inputs)
    return Slice.unwrap(-1 if pos_slice == "last" else pos_slice)
