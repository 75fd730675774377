"""Steering vectors as one safetensors file: tensors, and all else as JSON in the metadata."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.runtime.files import atomic_write, why

FORMAT = 1
KEY = "hooked_vlm.steering"


def write_file(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Write tensors and header.

    Raises:
        OutputError: the file cannot be written; nothing is left of it.
    """
    text = json.dumps({"format": FORMAT, **header})
    atomic_write(path, lambda aside: save_file({k: v.contiguous() for k, v in tensors.items()}, aside, {KEY: text}))
    return path


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and header; nothing is unpickled.

    Raises:
        InputError: there is no such file, it is damaged or of something else, or numbers in it are not finite.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}: give the safetensors file that `save` or `hooked-vlm steer` wrote")
    try:
        with safe_open(path, "pt", device="cpu") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        header = json.loads(text) if text is not None else None
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path} is damaged, or no safetensors file: {why(error)}") from error
    if not isinstance(header, dict):
        raise InputError(f"{path} holds no steering vectors: its metadata has no {KEY!r}")
    if header.get("format") != FORMAT:
        raise InputError(f"{path} has format {header.get('format')}, this version reads {FORMAT}: make it again")
    if bad := [name for name, x in tensors.items() if not bool(torch.isfinite(x).all())]:
        raise InputError(f"{path} is damaged: {bad[0]} has numbers that are not finite")
    return tensors, header
