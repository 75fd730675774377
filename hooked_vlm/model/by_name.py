"""The model that a command asks."""

from hooked_vlm.model.vlm import HookedVLM


def load(name: str, device: str | None, dtype: str) -> HookedVLM:
    """A model by its name.

    Args:
        device: CUDA if present by default; "auto" spreads the model over all GPUs and, if these are too small, over the
            CPU and the disk (docs/large-models.md).
        dtype: by its name, "auto" for the checkpoint's own.

    Raises:
        CheckpointError: see `HookedVLM.from_pretrained`.
    """
    if device == "auto":
        return HookedVLM.from_pretrained(name, device_map="auto", dtype=dtype)
    return HookedVLM.from_pretrained(name, device=device, dtype=dtype)
