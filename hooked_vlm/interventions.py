"""Interventions as data: small frozen objects that compile to ordinary (hook name, function) pairs.

model.generate(inputs, fwd_hooks=ZeroHeads(((2, 1), (3, 0))).hooks(model))
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hooked_vlm.token_layout import InputError

Head = tuple[int, int]
"""(layer, head), both from 0."""


@dataclass(frozen=True)
class ZeroHeads:
    """Heads write nothing: their `hook_z` is zero at every position and every step of generation."""

    heads: tuple[Head, ...]

    def hooks(self, model: Any) -> list[tuple[str, Callable]]:
        """One hook for every layer concerned.

        Raises:
            InputError: a layer or head the model does not have.
        """
        by_layer: dict[int, list[int]] = defaultdict(list)
        for layer, head in check_heads(model, self.heads):
            by_layer[layer].append(head)
        return [(f"blocks.{layer}.attn.hook_z", _zero(heads)) for layer, heads in sorted(by_layer.items())]


def _zero(heads: Sequence[int]) -> Callable[[Tensor, Any], Tensor]:
    def zero(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, heads] = 0
        return z

    return zero


def check_heads(model: Any, heads: Sequence[Head]) -> Sequence[Head]:
    """The same heads.

    Raises:
        InputError: a layer or head out of range.
    """
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise InputError(
                f"there is no head {layer}.{head}: the model has layers 0 to {n_layers - 1} "
                f"with heads 0 to {n_heads - 1}"
            )
    return heads
