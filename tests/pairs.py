"""Clean and corrupt inputs of both families' tiny models, and the literal loop that a patching sweep must equal."""

from collections.abc import Callable
from typing import Any

import torch
from families import ROWS, inputs_of, tiny_model
from torch import Tensor

from hooked_vlm.patching import Pair
from hooked_vlm.patching.pairs import Direction


def model_and_pair(family: str, rows: str = "one image", **settings: Any) -> tuple[Any, Pair]:
    """The same words about other pictures."""
    clean, corrupt = (inputs_of(family, ROWS[rows], seed) for seed in (1, 2))
    return tiny_model(family), Pair(clean, corrupt, **settings)


def last_logits(logits: Tensor, inputs: Any) -> Tensor:
    """Of each row's last token."""
    return logits[torch.arange(len(inputs)), torch.tensor(inputs.stop) - 1]


@torch.no_grad()
def patched_by_hand(model: Any, pair: Pair, direction: Direction, name: str, put: Callable[[Tensor, Tensor], None]):
    """Logits of the edited run's last tokens; `put(x, source)` writes into x."""
    base, source = (pair.corrupt, pair.clean) if direction == "denoising" else (pair.clean, pair.corrupt)
    kept: list[Tensor] = []
    model.run_with_hooks(source, fwd_hooks=[(name, lambda x, hook: kept.append(x.clone()))])

    def edit(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        put(x, kept[0])
        return x

    return last_logits(model.run_with_hooks(base, fwd_hooks=[(name, edit)]), base)
