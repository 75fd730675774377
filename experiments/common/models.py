"""Check a study's model."""

from hooked_vlm.errors import StudyError
from hooked_vlm.model.vlm import HookedVLM


def check_takes_images(model: HookedVLM, name: str) -> None:
    """Refuse a model that cannot answer questions about images.

    Raises:
        StudyError: the model has no vision tower or no tokenizer.
    """
    if model.cfg.vision is None or model.tokenizer is None:
        lacks = "vision tower" if model.cfg.vision is None else "tokenizer"
        raise StudyError(f"{name} has no {lacks}: this study asks questions about images")
