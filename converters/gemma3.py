"""Gemma 3: `config.json` to our configuration, and Hugging Face tensors to ours and back.

`hooked_vlm.converters.composed` has the spellings of names of tensors. Defaults are those of `Gemma3Config` in
transformers 5.23.0.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any, Literal

from torch import Tensor

from hooked_vlm.converters import composed
from hooked_vlm.converters.clip_towers import SIGLIP, tower_kwargs, tower_table
from hooked_vlm.converters.composed import TEXT, to_ours, to_theirs
from hooked_vlm.converters.dialects import GEMMA3
from hooked_vlm.converters.fields import Fields, refuse_quantised
from hooked_vlm.converters.language_models import decoder_kwargs
from hooked_vlm.converters.renaming import Rename

ARCHITECTURES, MODEL_TYPES = ("Gemma3ForConditionalGeneration",), ("gemma3",)
dtype, published_config = composed.dtype, composed.published_config


def config_kwargs(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `VLMConfig`; `"vision"` holds those for `VisionConfig`.

    Raises:
        CheckpointError: a field is missing, absurd, contradicts another or asks for something not supported.
    """
    root = Fields(hf_config)
    refuse_quantised(root)
    section = root.section("text_config")
    Fields(section, where="text_config").one_of("model_type", (GEMMA3.model_type,), default=GEMMA3.model_type)
    text = decoder_kwargs(section, GEMMA3, where="text_config")
    image_token_id = root.token_id("image_token_id", default=262144)
    return {
        **text,
        "output_logits_soft_cap": None,  # the class with a vision tower does not read it
        "bidirectional": "image",
        "window_cuts_blocks": True,
        "tie_word_embeddings": root.flag("tie_word_embeddings", True),
        "image_token_id": root.token_id("image_token_index", default=image_token_id),
        "vision_start_token_id": root.token_id("boi_token_index", default=root.token_id("boi_token_id", 255999)),
        "vision_end_token_id": root.token_id("eoi_token_index", default=root.token_id("eoi_token_id", 256000)),
        "eos_token_ids": root.token_ids("eos_token_id", default=text["eos_token_ids"]),
        "pad_token_id": root.token_id("pad_token_id", default=text["pad_token_id"]),
        "prompt_style": "gemma",
        "vision": _vision_kwargs(root, text["d_model"]),
        "original_architecture": ARCHITECTURES[0],
    }


def _vision_kwargs(root: Fields, text_width: int) -> dict[str, Any]:
    vision = Fields(root.section("vision_config"), where="vision_config")
    tower = tower_kwargs(vision, vision.one_of("model_type", (SIGLIP,), default=SIGLIP), text_width)
    patches, n_tokens = tower["tile_size"] // tower["patch_size"], root.size("mm_tokens_per_image", default=256)
    if isqrt(n_tokens) ** 2 != n_tokens or patches % isqrt(n_tokens):
        expected = f"a square number whose root divides the {patches} rows of patches of a picture"
        raise root.error("mm_tokens_per_image", expected, n_tokens)
    return {
        **tower,
        "post_norm": True,
        "processor": "pan_and_scan",
        "projector": ("pool", "norm", "linear"),
        "pool_size": patches // isqrt(n_tokens),
        "projector_norm_type": "RMS",
        "projector_norm_offset": True,
        "projector_eps": tower["eps"],
        "projector_bias": False,
    }


def from_hf(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], notes: list[str] | None = None
) -> dict[str, Tensor]:
    """Our tensors from a checkpoint's (or from the state dict of a transformers model), as views.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or contradict `tie_word_embeddings`.
    """
    cfg = config_kwargs(config)
    return to_ours(tensors, _table(cfg), cfg, GEMMA3, notes)


def to_hf(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    names: Literal["published", "in_memory"] = "published",
) -> dict[str, Tensor]:
    """The inverse of `from_hf`; see `hooked_vlm.converters.composed.to_theirs`.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or `unembed.weight` is no longer tied.
        ValueError: `names` is neither of the two.
    """
    cfg = config_kwargs(config)
    return to_theirs(tensors, _table(cfg), cfg, names)


def _table(cfg: Mapping[str, Any]) -> list[Rename]:
    """Every tensor of a model with these settings, by its published name."""
    vision, theirs = cfg["vision"], "multi_modal_projector"
    width, d_out = vision["d_model"], vision["d_out"]
    return [
        *GEMMA3.table(cfg, prefix=TEXT),
        *tower_table(vision, last_norm="vision.ln_post"),
        Rename(f"{theirs}.mm_soft_emb_norm.weight", ("projector.ln.weight",), (width,)),
        Rename(f"{theirs}.mm_input_projection_weight", ("projector.out_proj.weight",), (width, d_out), transposed=True),
    ]
