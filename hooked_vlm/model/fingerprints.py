"""Identity of a model, which every result records: weights, settings, versions, device, kernel."""

import hashlib
import json
import platform
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_vlm.nn.weight_access import sorted_values
from hooked_vlm.runtime.digests import digest
from hooked_vlm.runtime.provenance import code_hash

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

_AT_ONCE = 2**22
"""Number of words that are multiplied at a time."""
PACKAGES = ("hooked-vlm", "torch", "transformers", "transformer_lens", "numpy", "pillow")


def provenance(model: "HookedVLM") -> dict[str, Any]:
    """Record of the model and the software, for run.json."""
    cfg = model.cfg
    return {
        "model": cfg.model_name,
        "weights": weights_hash(model),
        "settings": _settings(model),
        "tokenizer": _tokenizer(model.tokenizer),
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "quantised": cfg.quantize,
        "device": str(cfg.device),
        "attention": "fused; explicit where scores or patterns are hooked",
        "code": code_hash(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


@torch.no_grad()
def weights_hash(model: "HookedVLM") -> str:
    """Sixteen digits that stand for a model: its weights as they are now and its configuration, on any device.

    Of the configuration: all that decides results (rotary bases, epsilons, stop tokens, ...) and is not at its
    default, so that a field that is added later leaves the hashes of models without it. Of each tensor: name, shape,
    dtype, and the sum of its bytes, eight at a time as whole numbers, each times an odd number of its column and one of
    its row. Any change of one weight alters it, and so does any exchange of rows, columns or single weights but for a
    chance of one in 2^60. A bar shows how far it is where it takes longer than a second.
    """
    plain = model.cfg.with_(model_name="", device=torch.device("cpu"))  # wherever it was found, wherever it runs
    digest = hashlib.sha256(f"{_told(plain)}\n".encode())
    tensors = sorted_values(model)
    for name, tensor in tqdm(tensors, desc="hashing weights", unit="tensor", delay=1, leave=False, disable=None):
        words = _words(tensor)
        columns = _odd(words.shape[1], words.device)
        rows = torch.cat([(part * columns).sum(1) for part in words.split(max(1, _AT_ONCE // max(1, words.shape[1])))])
        total = int((rows * _odd(len(rows), rows.device)).sum())
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total}\n".encode())
    return digest.hexdigest()[:16]


def _told(cfg: Any) -> str:
    """The fields of a configuration that are not at their defaults, as text."""
    told = [
        f"{field.name}={_told(value) if is_dataclass(value) else repr(value)}"
        for field in fields(cfg)
        if field.repr and (value := getattr(cfg, field.name)) != field.default
    ]
    return f"{type(cfg).__name__}({', '.join(told)})"


def _words(tensor: Tensor) -> Int[Tensor, "row word"]:
    """The bytes of a tensor, eight at a time; zeros fill up the last ones."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if len(flat) % 8:
        flat = F.pad(flat, (0, -len(flat) % 8))
    if flat.storage_offset() % 8:
        flat = flat.clone()
    words = flat.view(torch.int64)
    n_rows = len(tensor) if tensor.ndim > 1 else 1
    return words.view(n_rows, -1) if n_rows and len(words) % n_rows == 0 else words.view(1, -1)


def _odd(n: int, device: torch.device) -> Int[Tensor, "n"]:
    """Return `n` odd numbers without a pattern that weights could have (splitmix64's constants; products wrap)."""
    x = torch.arange(1, n + 1, device=device) * -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    return (x ^ (x >> 27)) | 1


def identity(model: "HookedVLM") -> dict[str, str]:
    """Everything of a model that decides results, by digests: equal for equal models on any machine.

    Weights, settings (configuration, pictures, generation), tokenizer with its chat template, code, and the versions
    of the packages that compute.
    """
    software = {package: version(package) for package in ("hooked-vlm", "torch", "transformers")}
    return {
        "weights": weights_hash(model),
        "settings": _settings(model),
        "tokenizer": _tokenizer(model.tokenizer),
        **software,
        "code": code_hash(),
    }


def _settings(model: "HookedVLM") -> str:
    cfg = model.cfg.with_(model_name="", device=torch.device("cpu"))
    return digest((cfg, model.image_processor, model.generation_config))


def _tokenizer(tokenizer: Any) -> str:
    """Digest of what a tokenizer makes of text: its rules, vocabulary, special tokens and chat template."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = dict(sorted(tokenizer.get_vocab().items())) if backend is None else json.loads(backend.to_str())
    rules = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}  # left by calls
    told = {name: str(getattr(tokenizer, name, None)) for name in ("special_tokens_map", "chat_template")}
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, rules, told], sort_keys=True).encode()).hexdigest()[:32]
