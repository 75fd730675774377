"""Identity of a model, which every result records: weights, settings, versions, device, kernel."""

import hashlib
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from hooked_vlm.nn.weight_access import sorted_values
from hooked_vlm.runtime.digests import digest
from hooked_vlm.runtime.provenance import code_hash

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PACKAGES = ("hooked-vlm", "torch", "transformers", "transformer_lens", "numpy", "pillow")


def provenance(model: "HookedVLM") -> dict[str, Any]:
    """Record of the model and the software, for run.json."""
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


@torch.no_grad()
def weights_hash(model: "HookedVLM") -> str:
    """Sixteen digits that stand for a model: its weights and its configuration, the same on every device.

    Of the configuration: all that decides results (rotary bases, epsilons, stop tokens, ...). Of each tensor: name,
    shape, dtype, and sums of its bits as whole numbers over rows and over columns, weighted by their places, which any
    change of a weight and any exchange of rows, columns or single weights alters. Reading the weights twice is all it
    costs.
    """
    plain = model.cfg.with_(model_name="", device=torch.device("cpu"))  # wherever it was found, wherever it runs
    # a model keeps its hash from version to version: the last field is one that 0.1 had
    digest = hashlib.sha256(f"{str(plain)[:-1]}, use_compile=False)\n".encode())
    for name, tensor in sorted_values(model):
        bits = tensor.contiguous().view(_BITS[tensor.element_size()])
        bits = bits.flatten(1) if bits.ndim > 1 else bits.reshape(-1, 1)
        rows, columns = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
        weighted = [int((sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum()) for sums in (rows, columns)]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(rows.sum())} {weighted}\n".encode())
    return digest.hexdigest()[:16]


def identity(model: "HookedVLM") -> dict[str, str]:
    """Hashes of weights, settings and code, and versions of the software: equal for equal models on any machine."""
    software = {package: version(package) for package in ("hooked-vlm", "torch", "transformers")}
    cfg = model.cfg.with_(model_name="", device=torch.device("cpu"))
    settings = digest((cfg, model.image_processor))
    return {"weights": weights_hash(model), "settings": settings, **software, "code": code_hash()}
