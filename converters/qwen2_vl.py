"""Qwen2-VL: the settings and tensors of its tower and projector (`hooked_vlm.converters.qwen_vl` has the rest).

Defaults are those of `Qwen2VLConfig` in transformers 5.23.0 (configuration_qwen2_vl.py).
"""

from collections.abc import Mapping
from typing import Any

from hooked_vlm.converters.fields import Fields
from hooked_vlm.converters.qwen_vl import QwenVL, shared_vision_fields, tower_kwargs
from hooked_vlm.converters.renaming import Rename, affine


def _vision_kwargs(vision: Fields, text_width: int) -> dict[str, Any]:
    d_mlp = vision.size("embed_dim", default=1280) * vision.size("mlp_ratio", default=4)
    return {
        **tower_kwargs(vision, text_width, width=1280, names=("embed_dim", "hidden_size"), d_mlp=d_mlp),
        "act_fn": vision.one_of("hidden_act", ("quick_gelu",), default="quick_gelu"),
    }


def _published_vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **shared_vision_fields(vision),
        "embed_dim": vision["d_model"],
        "hidden_size": vision["d_out"],
        "mlp_ratio": vision["d_mlp"] // vision["d_model"],
        "in_chans": vision["in_channels"],
        "spatial_patch_size": vision["patch_size"],
    }


def _vision_mlp(cfg: Mapping[str, Any], theirs: str, ours: str) -> list[Rename]:
    width, d_mlp = cfg["d_model"], cfg["d_mlp"]
    return [
        *affine(f"{theirs}.mlp.fc1", (f"{ours}.mlp.in_proj",), (d_mlp, width)),
        *affine(f"{theirs}.mlp.fc2", (f"{ours}.mlp.out_proj",), (width, d_mlp)),
    ]


FAMILY = QwenVL(
    "Qwen2VLForConditionalGeneration",
    "qwen2_vl",
    vision_kwargs=_vision_kwargs,
    vision_mlp=_vision_mlp,
    published_vision=_published_vision,
)
ARCHITECTURES, MODEL_TYPES = (FAMILY.architecture,), (FAMILY.model_type,)
config_kwargs, dtype, published_config = FAMILY.config_kwargs, FAMILY.dtype, FAMILY.published_config
from_hf, to_hf = FAMILY.from_hf, FAMILY.to_hf
