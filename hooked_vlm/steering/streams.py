"""Residual streams of single inputs, averaged over chosen positions."""

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.data import Sample
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import Positions, position_table
from hooked_vlm.nn.hooks import HookPoint, hooked_module
from hooked_vlm.runtime.digests import digest
from hooked_vlm.runtime.progress import Progress

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Item = Sample | VLMInputs
"""One input of a contrast set; `VLMInputs` of several rows are as many items."""


@dataclass(frozen=True, eq=False)
class Streams:
    """Residual streams of a set of items, on the CPU."""

    means: Float[Tensor, "item layer d_model"]
    """Averaged over an item's positions, in float32."""
    norms: Float[Tensor, "item layer"]
    """Mean Euclidean norm of the stream over the same positions."""
    digests: tuple[str, ...]
    """Content of each item: tokens, pixels, and where they lie."""


@torch.no_grad()
def mean_streams(
    model: "HookedVLM",
    items: Iterable[Item],
    names: Sequence[str],
    positions: Positions = "final",
    *,
    kind: str = "set",
    progress: bool = False,
    **bounds: Any,
) -> Streams:
    """Run every item alone, as far as the last layer needed, and average each residual stream over its positions.

    Args:
        names: hook points of the residual stream, one for each layer, in order.
        positions: which positions of an item are averaged; each item must have some.
        kind: name of the set in error messages and on the progress bar.
        bounds: `max_pixels`, `max_tiles` of samples' pictures, as in `model.to_inputs`.

    Raises:
        InputError: no items, an item that cannot be used or lacks the positions (its number is named), hooks left on
            the model.
        HookError: a name that does not exist or would not fire.
    """
    if hooked := hooked_module(model):
        raise InputError(
            f"the model has a hook at {hooked!r}, which may change the streams: remove it "
            "(from hook points with model.reset_hooks(including_permanent=True))"
        )
    for name in names:
        model.check_hook_name(name)
    stop = 1 + max(int(name.split(".")[1]) for name in names)
    means, norms, digests = [], [], []
    total = len(items) if isinstance(items, Sized) else None
    with Progress(f"{kind} items", "item", total, quiet=not progress) as bar:
        for number, item in enumerate(items):
            try:
                for inputs in _rows(model, item, bounds):
                    own = _streams_of(model, inputs, names, positions, stop)
                    means.append(torch.stack([own[name].mean(0) for name in names]))
                    norms.append(torch.stack([own[name].norm(dim=-1).mean() for name in names]))
                    digests.append(digest(inputs.portable()))
            except InputError as error:
                raise InputError(f"item {number} of the {kind} set: {error}") from error
            bar.update()
    if not means:
        raise InputError(f"the {kind} set is empty: a contrast needs items on both sides")
    return Streams(torch.stack(means), torch.stack(norms), tuple(digests))


def _rows(model: "HookedVLM", item: Item, bounds: dict[str, Any]) -> list[VLMInputs]:
    if isinstance(item, Sample):
        return [item.inputs(model, **bounds)]
    if isinstance(item, VLMInputs):
        return [item[row] for row in range(len(item))]
    raise InputError(f"expected a Sample or VLMInputs (model.to_inputs(...)), got a {type(item).__name__}")


def _streams_of(
    model: "HookedVLM", inputs: VLMInputs, names: Sequence[str], positions: Positions, stop: int
) -> dict[str, Float[Tensor, "chosen d_model"]]:
    """The stream of one row at its chosen positions, by hook point, in float32 on the CPU."""
    chosen = position_table(positions, inputs)[0, :-1].nonzero()[:, 0]
    if not len(chosen):
        raise InputError(f"it has no {positions} positions")
    found: dict[str, Tensor] = {}

    def keep(x: Float[Tensor, "batch pos d_model"], hook: HookPoint, name: str) -> None:
        found[name] = x[0, chosen.to(x.device)].float().cpu()

    with model.hooks([(name, partial(keep, name=name)) for name in names]):
        model(inputs, return_type=None, stop_at_layer=stop)
    return found
