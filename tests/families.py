"""Both families' tiny and bundled models, with inputs of the same kinds, for laws that hold in either."""

import copy
from functools import lru_cache
from typing import Any

import pytest
import tiny
import tiny_internvl

from hooked_vlm import HookedVLM

FAMILIES = ("qwen2-vl", "internvl2")

# name: (row of both families; a number stands for an image, of two sizes)
ROWS: dict[str, list[list[Any]]] = {
    "one image": [[5, 6, "small", 7, 8, 9, 10]],
    "two images": [[5, "small", 7, "large", 8, 9]],
    "padded": [[5, 6, "small", 7, 8], [11, 12, 13], [5, "large", "small", 9]],
}
IMAGES = {
    "qwen2-vl": {"small": ("image", (1, 4, 4)), "large": ("image", (1, 4, 6))},
    "internvl2": {"small": ("image", 1), "large": ("image", 2)},
}


@lru_cache
def tiny_model(family: str) -> Any:
    """Shared: weights must not be changed, hooks not left."""
    return tiny.tiny_model() if family == "qwen2-vl" else tiny_internvl.tiny_model("qwen2")


def inputs_of(family: str, rows: list[list[Any]], seed: int = 0) -> Any:
    """Rows as in `ROWS` for the family's tiny model, about pictures of this seed."""
    filled = [[IMAGES[family].get(item, item) for item in row] for row in rows]
    batch = tiny.hf_batch if family == "qwen2-vl" else tiny_internvl.hf_batch
    return tiny_model(family).inputs_from_hf(batch(filled, seed))


def model_and_inputs(family: str, rows: str) -> tuple[Any, Any]:
    """A family's tiny model, which is shared, and inputs of its own."""
    return tiny_model(family), inputs_of(family, ROWS[rows])


ONE_TOY = ("toy-qwen2-vl", pytest.param("toy-internvl2", marks=pytest.mark.full))
"""The bundled models for costly laws: the second one with --full."""


@lru_cache
def bundled(name: str) -> HookedVLM:
    """A bundled model on the CPU. Shared: weights must not be changed, hooks not left."""
    return HookedVLM.from_pretrained(name, device="cpu")


def own_copy(model: Any) -> Any:
    """The same weights in a model of a test's own, whose modules and switches it may change."""
    return copy.deepcopy(model)
