"""Attention of chosen queries only, such as those of the answer tokens, at linear cost.

The pattern of every head for a handful of query positions, computed beside the fused kernel from the rotated
queries and keys that pass the hook points. No [pos, pos] tensor is allocated.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import in_range
from hooked_vlm.nn.hooks import HookPoint

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Rows = Float[Tensor, "batch head row key"]


@torch.no_grad()
def attention_rows(
    model: "HookedVLM",
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
    chosen = in_range(layers, model.cfg.n_layers, "layer")
    positions = positions.to(inputs.device)
    _check_positions(inputs, positions)
    found: dict[int, Tensor] = {}

    def watch(z: Tensor, hook: HookPoint) -> None:
        rows = hook.ctx["attention"].pattern(positions.to(z.device))
        found[hook.layer()] = rows if reduce is None else reduce(rows)

    watching = [(f"blocks.{layer}.attn.hook_z", watch) for layer in chosen]
    model.run_with_hooks(inputs, return_type=None, fwd_hooks=[*fwd_hooks, *watching])
    return torch.stack([found[layer].to(inputs.device) for layer in chosen])


@torch.no_grad()
def generate_with_rows(
    model: "HookedVLM",
    inputs: VLMInputs,
    max_new_tokens: int,
    layers: Sequence[int] | None = None,
    reduce: Callable[[Rows], Tensor] | None = None,
    **settings: Any,
) -> tuple[Int[Tensor, "batch pos"], Shaped[Tensor, "layer batch head token ..."]]:
    """Generate tokens, with the attention row of the query that predicted each of them.

    The rows are computed during generation, from one query each; the pass over the prompt computes no pattern either.

    Args:
        reduce: applied to each layer's row [batch, head, 1, key] at once. Without it, rows are as long as the whole
            (prompt and answer), zero behind the keys a step had.
        settings: of `model.generate`.

    Returns:
        The tokens [batch, pos] as `generate` gives them, and [layer, batch, head, token, key] or the stacked results
        of `reduce`, [layer, batch, head, token].

    Raises:
        InputError: a layer out of range.
    """
    chosen = in_range(layers, model.cfg.n_layers, "layer")
    steps: dict[int, list[Tensor]] = {layer: [] for layer in chosen}

    def watch(z: Tensor, hook: HookPoint) -> None:
        last = torch.full((1, 1), z.shape[1] - 1, device=z.device)
        row = hook.ctx["attention"].pattern(last)
        steps[hook.layer()].append(row if reduce is None else reduce(row))

    hooks = [*settings.pop("fwd_hooks", ()), *((f"blocks.{layer}.attn.hook_z", watch) for layer in chosen)]
    tokens = model.generate(inputs, max_new_tokens, fwd_hooks=hooks, **settings)
    if reduce is None:
        n_keys = max(row.shape[-1] for rows in steps.values() for row in rows)
        steps = {layer: [F.pad(row, (0, n_keys - row.shape[-1])) for row in rows] for layer, rows in steps.items()}
    return tokens, torch.stack([torch.cat(steps[layer], dim=2).to(tokens.device) for layer in chosen])


def _check_positions(inputs: VLMInputs, positions: Int[Tensor, "batch row"]) -> None:
    if positions.shape[0] != len(inputs):
        raise InputError(f"positions must be [batch, row] with {len(inputs)} rows, got {tuple(positions.shape)}")
    first = torch.tensor(inputs.first, device=inputs.device)[:, None]
    stop = torch.tensor(inputs.stop, device=inputs.device)[:, None]
    if ((positions < first) | (positions >= stop)).any():
        raise InputError("a query position lies outside the inputs or under their padding")
