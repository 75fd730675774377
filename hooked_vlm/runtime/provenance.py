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

from hooked_vlm.nn.weight_access import sorted_values

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
OWN = ("hooked_vlm", "hooked_vlm.converters", "hooked_vlm.experiments")
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
    for package in OWN:
        root = _folder(package)
        for parent, folders, files in os.walk(root):
            # parts of the whole, which in a checkout are links to folders elsewhere
            folders[:] = sorted(name for name in folders if _name_of(package, root, parent, name) not in OWN)
            for file in sorted(name for name in files if name.endswith(".py")):
                digest.update(f"{_name_of(package, root, parent, file)}\n".encode() + Path(parent, file).read_bytes())
    return digest.hexdigest()[:16]


def _folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _name_of(package: str, root: Path, parent: str, name: str) -> str:
    return ".".join((package, *Path(parent).relative_to(root).parts, name))


@torch.no_grad()
def weights_hash(model: Any) -> str:
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
