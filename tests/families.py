"""Both families' tiny and bundled models, with inputs of the same kinds, for laws that hold in either."""

import copy
from functools import lru_cache
from typing import Any

import pytest
import tiny
import tiny_internvl

from hooked_vlm import HookedVLM

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


def model_and_inputs(family: str, rows: str) -> tuple[Any, Any]:
    """Shared: weights must not be changed, hooks not left."""
    filled = [[IMAGES[family].get(item, item) for item in row] for row in ROWS[rows]]
    if family == "qwen2-vl":
        return tiny.tiny_model(), tiny.inputs(filled)
    model = tiny_internvl.tiny_model("qwen2")
    return model, model.inputs_from_hf(tiny_internvl.hf_batch(filled))


ONE_TOY = ("toy-qwen2-vl", pytest.param("toy-internvl2", marks=pytest.mark.full))
"""The bundled models for costly laws: the second one with --full."""


@lru_cache
def bundled(name: str) -> HookedVLM:
    """A bundled model on the CPU. Shared: weights must not be changed, hooks not left."""
    return HookedVLM.from_pretrained(name, device="cpu")


def own_copy(model: Any) -> Any:
    """The same weights in a model of a test's own, whose modules and switches it may change."""
    return copy.deepcopy(model)
