"""Clean and corrupt inputs of both families' tiny models, and the literal loop that a patching sweep must equal."""

from collections.abc import Callable
from typing import Any

import tiny
import tiny_internvl
import torch
from families import IMAGES, ROWS, model_and_inputs
from torch import Tensor

from hooked_vlm.patching import Pair
from hooked_vlm.patching.pairs import Direction

FAMILIES = ("qwen2-vl", "internvl2")


def inputs_of(family: str, rows: list[list[Any]], seed: int) -> Any:
    """Rows as in `families.ROWS`, about pictures of their own."""
    filled = [[IMAGES[family].get(item, item) for item in row] for row in rows]
    if family == "qwen2-vl":
        return tiny.inputs(filled, seed)
    return tiny_internvl.tiny_model("qwen2").inputs_from_hf(tiny_internvl.hf_batch(filled, seed))


def model_and_pair(family: str, rows: str = "one image", **settings: Any) -> tuple[Any, Pair]:
    """The same words about other pictures."""
    model, _ = model_and_inputs(family, rows)
    clean, corrupt = (inputs_of(family, ROWS[rows], seed) for seed in (1, 2))
    return model, Pair(clean, corrupt, **settings)


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
