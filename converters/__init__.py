"""Checkpoint families, one module each: Hugging Face configurations to ours, Hugging Face tensors to ours and back.

Converters take and return plain dicts and tensors, and import no module of the model. A family module has
`ARCHITECTURES`, `MODEL_TYPES`, `config_kwargs`, `dtype`, `published_config`, `from_hf` and `to_hf`.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from hooked_vlm.converters import internvl, language_models, llava, qwen2_vl
from hooked_vlm.converters.checkpoint import open_tensors, read_config, read_json
from hooked_vlm.converters.fields import DTYPES
from hooked_vlm.converters.known_models import KNOWN_MODELS
from hooked_vlm.errors import CheckpointError

__all__ = ["DTYPES", "FAMILIES", "KNOWN_MODELS", "converter_for", "open_tensors", "read_config", "read_json"]

FAMILIES: tuple[ModuleType, ...] = (qwen2_vl, internvl, llava, language_models)


def converter_for(hf_config: Mapping[str, Any]) -> ModuleType:
    """The family module for a checkpoint, by its `architectures` or, where it has none, its `model_type`.

    `auto_map` (remote code) is ignored.

    Raises:
        CheckpointError: the architecture is not supported; the supported ones are listed.
    """
    stated = hf_config.get("architectures") or []
    architectures = stated if isinstance(stated, list) else [stated]
    model_type = hf_config.get("model_type")
    for family in FAMILIES:
        if any(name in family.ARCHITECTURES for name in architectures):
            return family
        if not architectures and model_type in family.MODEL_TYPES:
            return family
    for name in architectures:
        if advice := llava.INSTEAD.get(name):
            raise CheckpointError(f"architecture {name} {advice}")
    name = f"architecture {', '.join(map(str, architectures))}" if architectures else f"model_type {model_type!r}"
    supported = ", ".join(name for family in FAMILIES for name in family.ARCHITECTURES)
    raise CheckpointError(f"{name} is not supported; supported are {supported}")
