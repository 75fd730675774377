"""Qwen2.5-VL: the settings and tensors of its tower and projector (`hooked_vlm.converters.qwen_vl` has the rest).

Defaults are those of `Qwen2_5_VLConfig` in transformers 5.23.0 (configuration_qwen2_5_vl.py).
"""

from collections.abc import Mapping
from typing import Any

from hooked_vlm.converters.fields import Fields
from hooked_vlm.converters.qwen_vl import (
    QwenVL,
    layers_of,
    shared_vision_fields,
    tower_kwargs,
)
from hooked_vlm.converters.renaming import Rename, affine


def _vision_kwargs(vision: Fields, text_width: int) -> dict[str, Any]:
    d_mlp = vision.size("intermediate_size", default=3420)
    shared = tower_kwargs(vision, text_width, width=3584, names=("hidden_size", "out_hidden_size"), d_mlp=d_mlp)
    return {
        **shared,
        "act_fn": vision.one_of("hidden_act", ("silu",), default="silu"),
        "gated_mlp": True,
        "normalization_type": "RMS",
        "projector_norm_type": "RMS",
        "window": _window(vision, shared["patch_size"], shared["merge_size"]),
        "full_layers": layers_of(vision, "fullatt_block_indexes", (7, 15, 23, 31), shared["n_layers"]),
        "positions_per_second": vision.number("tokens_per_second", default=4),
    }


def _window(vision: Fields, patch_size: int, merge_size: int) -> int:
    """Side of a window in patches: as many whole merge blocks as `window_size` pixels hold."""
    pixels = vision.size("window_size", default=112)
    if pixels < patch_size * merge_size:
        raise vision.error("window_size", f"at least the {patch_size * merge_size} pixels of a merge block", pixels)
    return pixels // (patch_size * merge_size) * merge_size


def _published_vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    seconds = vision["positions_per_second"]
    return {
        **shared_vision_fields(vision),
        "hidden_act": vision["act_fn"],
        "hidden_size": vision["d_model"],
        "intermediate_size": vision["d_mlp"],
        "in_chans": vision["in_channels"],
        "out_hidden_size": vision["d_out"],
        "spatial_patch_size": vision["patch_size"],
        "window_size": vision["window"] * vision["patch_size"],
        "fullatt_block_indexes": list(vision["full_layers"]),
        "tokens_per_second": int(seconds) if seconds == int(seconds) else seconds,
    }


def _vision_mlp(cfg: Mapping[str, Any], theirs: str, ours: str) -> list[Rename]:
    width, d_mlp = cfg["d_model"], cfg["d_mlp"]
    return [
        *affine(f"{theirs}.mlp.gate_proj", (f"{ours}.mlp.gate_proj",), (d_mlp, width)),
        *affine(f"{theirs}.mlp.up_proj", (f"{ours}.mlp.in_proj",), (d_mlp, width)),
        *affine(f"{theirs}.mlp.down_proj", (f"{ours}.mlp.out_proj",), (width, d_mlp)),
    ]


FAMILY = QwenVL(
    "Qwen2_5_VLForConditionalGeneration",
    "qwen2_5_vl",
    vision_kwargs=_vision_kwargs,
    vision_mlp=_vision_mlp,
    published_vision=_published_vision,
)
ARCHITECTURES, MODEL_TYPES = (FAMILY.architecture,), (FAMILY.model_type,)
config_kwargs, dtype, published_config = FAMILY.config_kwargs, FAMILY.dtype, FAMILY.published_config
from_hf, to_hf = FAMILY.from_hf, FAMILY.to_hf
