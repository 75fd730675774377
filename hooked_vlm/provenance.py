"""What every result records of itself: versions, model, device, kernel."""

import hashlib
import os
import platform
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hooked_vlm.weight_access import sorted_values

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PACKAGES = ("hooked-vlm", "torch", "transformers", "transformer_lens", "numpy", "pillow")


def provenance(model: Any) -> dict[str, Any]:
    """For run.json: the model and the software."""
    cfg = model.cfg
    return {
        "model": cfg.model_name,
        "weights": weights_hash(model),
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "quantised": cfg.quantize,
        "device": str(cfg.device),
        "attention": "fused; explicit where scores or patterns are hooked",
        "code": code_hash(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


@cache
def code_hash() -> str:
    """Sixteen digits that stand for the library's own code, wherever it is installed.

    Between two releases the version stays the same while the code changes; this does not.
    """
    digest = hashlib.sha256()
    for package in ("hooked_vlm", "hooked_vlm.converters", "hooked_vlm.experiments"):
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        root = Path(next(iter(spec.submodule_search_locations)))
        # in a checkout two folders are links to their own places, which are walked by their own names
        files = (Path(parent, name) for parent, _, names in os.walk(root) for name in names if name.endswith(".py"))
        for file in sorted(files):
            digest.update(f"{package}/{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def weights_hash(model: Any) -> str:
    """Sixteen digits that stand for a model's weights; the same on every device.

    Of each tensor: name, shape, dtype, and two sums over its bits as whole numbers, which any change of a weight
    and any exchange of rows alters. Reading the weights once is all it costs.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted_values(model):
        bits = tensor.contiguous().view(_BITS[tensor.element_size()])
        sums = (bits.flatten(1) if bits.ndim > 1 else bits[:, None]).sum(1, dtype=torch.int64)
        weighted = sums * torch.arange(1, len(sums) + 1, device=sums.device)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(sums.sum())} {int(weighted.sum())}\n".encode())
    return digest.hexdigest()[:16]
