"""Attention of chosen queries only: what "where does each answer token look?" needs, at linear cost.

The pattern of every head for a handful of query positions, computed beside the fused kernel from the rotated
queries and keys that pass the hook points. No [pos, pos] tensor is made.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooked_vlm.attention import attention_pattern
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.token_layout import InputError

Rows = Float[Tensor, "batch head row key"]


@torch.no_grad()
def attention_rows(
    model: Any,
    inputs: VLMInputs,
    positions: Int[Tensor, "batch row"],
    layers: Sequence[int] | None = None,
    reduce: Callable[[Rows], Tensor] | None = None,
    fwd_hooks: Sequence[tuple[Any, Callable]] = (),
) -> Shaped[Tensor, "layer ..."]:
    """The attention pattern of some query positions, in one forward pass.

    `inputs.append(answer)` and the positions of the answer's tokens give the rows that a generation with a
    key-value cache has at its steps.

    Args:
        positions: which queries of each row of the batch; none of them padding.
        layers: which layers (all by default).
        reduce: applied to each layer's rows [batch, head, row, key] at once, so that what is kept can be
            smaller than the rows, e.g. `lambda rows: rows.argmax(-1)`.
        fwd_hooks: hooks for the same pass. Edits of scores or patterns are not seen here.

    Returns:
        [layer, batch, head, row, key], or the stacked results of `reduce`.

    Raises:
        InputError: a position outside the inputs or under their padding, or a layer out of range.
    """
    n_layers = model.cfg.n_layers
    chosen = range(n_layers) if layers is None else layers
    for layer in chosen:
        if not 0 <= layer < n_layers:
            raise InputError(f"layer {layer} is out of range: the model has layers 0 to {n_layers - 1}")
    positions = positions.to(inputs.device)
    _check_positions(inputs, positions)
    found: dict[int, Tensor] = {}

    def watch(z: Tensor, hook: Any) -> None:
        rows = attention_pattern(hook.ctx["attention"].scores(positions), keep_float32=True)
        found[hook.layer()] = rows if reduce is None else reduce(rows)

    watching = [(f"blocks.{layer}.attn.hook_z", watch) for layer in chosen]
    model.run_with_hooks(inputs, return_type=None, fwd_hooks=[*fwd_hooks, *watching])
    return torch.stack([found[layer] for layer in chosen])


def _check_positions(inputs: VLMInputs, positions: Int[Tensor, "batch row"]) -> None:
    if positions.shape[0] != len(inputs):
        raise InputError(f"positions must be [batch, row] with {len(inputs)} rows, got {tuple(positions.shape)}")
    first = torch.tensor(inputs.first, device=inputs.device)[:, None]
    stop = torch.tensor(inputs.stop, device=inputs.device)[:, None]
    if ((positions < first) | (positions >= stop)).any():
        raise InputError("a query position lies outside the inputs or under their padding")
