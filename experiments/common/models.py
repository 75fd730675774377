"""The model a study asks."""

from typing import Any

import torch

from hooked_vlm.experiments.common.errors import StudyError
from hooked_vlm.model import HookedVLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(name: str, device: str | None, dtype: str) -> HookedVLM:
    """A model on a device (CUDA if present by default), in a dtype of `DTYPES` or its checkpoint's own ("auto")."""
    return HookedVLM.from_pretrained(name, device=device, dtype=None if dtype == "auto" else DTYPES[dtype])


def check_asks_about_images(model: Any, name: str) -> None:
    """Refuse a model that cannot be asked about images.

    Raises:
        StudyError: it has no vision tower or no tokenizer.
    """
    if model.cfg.vision is None or model.tokenizer is None:
        lacks = "vision tower" if model.cfg.vision is None else "tokenizer"
        raise StudyError(f"{name} has no {lacks}: this study asks questions about images")
