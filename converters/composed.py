"""Files of transformers' models that are made of `vision_tower`, `multi_modal_projector` and `language_model`: LLaVA,
Gemma 3, PaliGemma.

Names of tensors come in four spellings, and any of them is read:

- published: `vision_tower.vision_model.*`, `language_model.model.*`, `language_model.lm_head.weight`;
- saved by transformers 5: the same without `vision_model`;
- in memory of transformers 5: `model.vision_tower.*`, `model.language_model.*`, `lm_head.weight`;
- saved by transformers 4.52 to 4.57: as in memory, with `vision_model`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hooked_vlm.converters.clip_towers import PREFIX as TOWER
from hooked_vlm.converters.dialects import Dialect
from hooked_vlm.converters.fields import stated_dtype, stored_in
from hooked_vlm.converters.renaming import Rename, tied_to_ours, tied_to_theirs

TEXT = "language_model."


def dtype(hf_config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype stated in the configuration, or None (then the tensors' own is used).

    Raises:
        CheckpointError: it names no floating-point dtype.
    """
    return stated_dtype(hf_config, "text_config")


def published_config(hf_config: Mapping[str, Any], stored_as: torch.dtype | None = None) -> dict[str, Any]:
    """The same configuration without references to remote code; `stored_as` replaces the stated dtype.

    Raises:
        CheckpointError: it names no floating-point dtype.
    """
    return stored_in(hf_config, dtype(hf_config) if stored_as is None else stored_as)


def to_ours(
    tensors: Mapping[str, Tensor],
    table: list[Rename],
    cfg: Mapping[str, Any],
    dialect: Dialect,
    notes: list[str] | None = None,
) -> dict[str, Tensor]:
    """Our tensors from a checkpoint's by the names in `table`, which are the published ones.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or contradict `tie_word_embeddings`.
    """
    return tied_to_ours(tensors, table, cfg, (TEXT + dialect.embed, TEXT + dialect.head), published_name, notes)


def to_theirs(
    tensors: Mapping[str, Tensor],
    table: list[Rename],
    cfg: Mapping[str, Any],
    names: Literal["published", "in_memory"],
) -> dict[str, Tensor]:
    """The inverse of `to_ours`, bit for bit and in the same dtypes.

    `names="published"` is for files: a tied output matrix is left out. `names="in_memory"` is the state dict
    of a transformers 5 model: a tied output matrix appears under both names, as one object.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or `unembed.weight` is no longer tied.
        ValueError: `names` is neither of the two.
    """
    if names not in ("published", "in_memory"):
        raise ValueError(f"names must be 'published' or 'in_memory', got {names!r}")
    in_memory = names == "in_memory"
    theirs = tied_to_theirs(tensors, table, cfg, in_memory_name if in_memory else str)
    if in_memory and cfg["tie_word_embeddings"]:
        theirs["lm_head.weight"] = theirs["model.language_model.embed_tokens.weight"]
    return theirs


def published_name(name: str) -> str:
    """The published name of a tensor, given its name in any of the spellings."""
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and not name.startswith(TOWER):
        return TOWER + name.removeprefix("vision_tower.")
    return name


def in_memory_name(name: str) -> str:
    """The name in transformers 5's memory of a tensor, given its published name."""
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name.replace(TOWER, "vision_tower.")
