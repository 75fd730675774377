"""A model's configuration and tokens from the settings in a checkpoint folder."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from hooked_vlm.config import LayerKind, RopeScaling, VLMConfig
from hooked_vlm.converters import DTYPES
from hooked_vlm.converters.fields import Fields
from hooked_vlm.errors import CheckpointError, InputError, PrecisionWarning
from hooked_vlm.inputs.templates import style_of
from hooked_vlm.vision_config import VisionConfig


def as_dtype(wanted: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype, also by its name; None for None and "auto".

    Raises:
        CheckpointError: no such dtype, or none that weights can have.
    """
    if wanted is None or wanted == "auto":
        return None
    dtype = DTYPES.get(wanted) if isinstance(wanted, str) else wanted
    if dtype not in DTYPES.values():
        raise CheckpointError(f'dtype must be "auto" or one of {", ".join(DTYPES)}, got {wanted!r}')
    return dtype


def as_device(wanted: torch.device | str | None) -> torch.device:
    """A device that holds tensors; CUDA, if there is one, by default."""
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"cannot use the device {str(wanted)!r} ({reason}): pass device=None or 'cpu'") from error
    return device


def model_config(converter: Any, hf_config: Mapping[str, Any], generation: Mapping[str, Any]) -> VLMConfig:
    fields = converter.config_kwargs(hf_config)
    vision, scaling = fields.pop("vision"), fields.pop("rope_scaling", None)
    kinds = fields.pop("layer_kinds", ())
    cfg = VLMConfig(
        **fields,
        vision=None if vision is None else VisionConfig(**vision),
        rope_scaling=_scaling(scaling),
        layer_kinds=tuple(LayerKind(**{**kind, "rope_scaling": _scaling(kind.get("rope_scaling"))}) for kind in kinds),
    )
    stated = Fields(generation, where="generation_config.json")
    pad = stated.token_id("pad_token_id")
    return cfg.with_(
        eos_token_ids=stated.token_ids("eos_token_id", cfg.eos_token_ids),
        pad_token_id=pad if cfg.pad_token_id is None else cfg.pad_token_id,
    )


def _scaling(fields: Mapping[str, Any] | None) -> RopeScaling | None:
    return None if fields is None else RopeScaling(**fields)


def with_tokens(cfg: VLMConfig, tokenizer: Any) -> VLMConfig:
    """Add the tokens that only the tokenizer knows: placeholders and the stop token of the family's prompts.

    Raises:
        CheckpointError: config.json names a conversation template that is not known, or the tokenizer has tokens
            outside the vocabulary that config.json states.
    """
    if cfg.vision is None or tokenizer is None:
        return cfg
    try:
        style = style_of(cfg)
    except InputError as error:
        raise CheckpointError(str(error)) from error
    if not style.tokens and style.stop is None:
        return cfg
    known = tokenizer.get_vocab()
    found: dict[str, Any] = {field: known[token] for field, token in style.tokens.items() if token in known}
    if style.stop in known:
        found["eos_token_ids"] = (known[style.stop],)
    outside = {token: i for token, i in known.items() if token in style.tokens.values() and i >= cfg.d_vocab}
    if outside:
        raise CheckpointError(
            f"the tokenizer's {outside} lie outside the vocabulary of {cfg.d_vocab} that config.json states: are the "
            "files of one checkpoint?"
        )
    return cfg.with_(**found)


def in_range(cfg: VLMConfig) -> VLMConfig:
    """The same configuration, with a warning where its dtype does not hold the activations.

    Warns:
        PrecisionWarning: float16, and the family's activations exceed it.
    """
    if cfg.dtype == torch.float16 and cfg.exceeds_float16:
        whose = cfg.model_name or "this model"
        text = f"activations of {whose} exceed float16's range (65,504): use bfloat16 or float32"
        warnings.warn(text, PrecisionWarning, stacklevel=3)
    return cfg
