"""Checkpoint families, one module each: Hugging Face configurations to ours, Hugging Face tensors to ours and back.

Converters take and return plain dicts and tensors, and import no module of the model.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hooked_vlm.converters import (
    gemma3,
    idefics3,
    internvl,
    language_models,
    llava,
    llava_variants,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
)
from hooked_vlm.converters.checkpoint import open_tensors, read_config, read_json
from hooked_vlm.converters.fields import DTYPES
from hooked_vlm.converters.known_models import KNOWN_MODELS
from hooked_vlm.errors import CheckpointError

__all__ = ["DTYPES", "FAMILIES", "KNOWN_MODELS", "Family", "converter_for", "open_tensors", "read_config", "read_json"]


@runtime_checkable
class Family(Protocol):
    """What a family module has. Values that differ between families are in what `config_kwargs` returns."""

    @property
    def ARCHITECTURES(self) -> tuple[str, ...]:
        """Names in `architectures` of config.json."""
        ...

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]:
        """The same in `model_type`, where config.json states no architecture."""
        ...

    @property
    def config_kwargs(self) -> Callable[..., dict[str, Any]]:
        """From config.json to the arguments of `VLMConfig`, those of `VisionConfig` under "vision"."""
        ...

    @property
    def dtype(self) -> Callable[..., torch.dtype | None]:
        """The dtype that config.json states."""
        ...

    @property
    def published_config(self) -> Callable[..., dict[str, Any]]:
        """config.json as it is written to a folder."""
        ...

    @property
    def from_hf(self) -> Callable[..., dict[str, Tensor]]:
        """Our tensors from a checkpoint's."""
        ...

    @property
    def to_hf(self) -> Callable[..., dict[str, Tensor]]:
        """The inverse, bit for bit."""
        ...


FAMILIES: list[Family] = [
    qwen2_vl, qwen2_5_vl, qwen3_vl, internvl, llava, gemma3, paligemma, idefics3, language_models,
]  # fmt: skip
"""Families by precedence. A family of one's own is appended, its image processor and the marks of its prompts are
added by name to `hooked_vlm.inputs.processors.PROCESSORS` and `hooked_vlm.inputs.prompt_styles.STYLES`."""


def converter_for(hf_config: Mapping[str, Any]) -> Family:
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
        if advice := llava_variants.INSTEAD.get(str(name)):
            raise CheckpointError(f"architecture {name} {advice}")
    name = f"architecture {', '.join(map(str, architectures))}" if architectures else f"model_type {model_type!r}"
    if "moe" in name.lower():
        raise CheckpointError(f"{name} is a mixture of experts, which is not supported: use a dense size of the family")
    supported = ", ".join(name for family in FAMILIES for name in family.ARCHITECTURES)
    raise CheckpointError(f"{name} is not supported; supported are {supported}")
