"""The model a study asks."""

from typing import Any

from hooked_vlm.errors import StudyError


def check_asks_about_images(model: Any, name: str) -> None:
    """Refuse a model that cannot be asked about images.

    Raises:
        StudyError: it has no vision tower or no tokenizer.
    """
    if model.cfg.vision is None or model.tokenizer is None:
        lacks = "vision tower" if model.cfg.vision is None else "tokenizer"
        raise StudyError(f"{name} has no {lacks}: this study asks questions about images")
