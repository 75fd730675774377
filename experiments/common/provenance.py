"""What every result records of itself: versions, model, device, kernel."""

import platform
from importlib.metadata import version
from typing import Any

from hooked_vlm.digests import weights_hash as weights_hash

PACKAGES = ("hooked-vlm", "torch", "transformers", "transformer_lens", "numpy", "pillow")


def provenance(model: Any) -> dict[str, Any]:
    """For run.json: the model and the software."""
    cfg = model.cfg
    return {
        "model": cfg.model_name,
        "weights": weights_hash(model),
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "device": str(cfg.device),
        "attention": "fused; explicit where scores or patterns are hooked",
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
