"""Qwen3-VL: the settings and tensors of its tower and projectors (`hooked_vlm.converters.qwen_vl` has the rest).

Defaults are those of `Qwen3VLConfig` in transformers 5.23.0 (configuration_qwen3_vl.py).
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from hooked_vlm.converters.dialects import QWEN3
from hooked_vlm.converters.fields import Fields
from hooked_vlm.converters.qwen_vl import QwenVL, layers_of, shared_vision_fields, tower_kwargs
from hooked_vlm.converters.renaming import Rename, affine


def _vision_kwargs(vision: Fields, text_width: int) -> dict[str, Any]:
    d_mlp, names = vision.size("intermediate_size", default=4304), ("hidden_size", "out_hidden_size")
    shared = tower_kwargs(vision, text_width, width=1152, patch_size=16, depth=27, names=names, d_mlp=d_mlp)
    n_positions = vision.size("num_position_embeddings", default=2304)
    if isqrt(n_positions) ** 2 != n_positions:
        raise vision.error("num_position_embeddings", "the number of places of a square table", n_positions)
    vision.one_of("hidden_act", ("gelu_pytorch_tanh",), default="gelu_pytorch_tanh")
    return {
        **shared,
        "act_fn": "gelu_tanh",
        "patch_bias": True,
        "n_positions": n_positions,
        "position_fit": "bilinear",
        "deepstack_layers": layers_of(vision, "deepstack_visual_indexes", (8, 16, 24), shared["n_layers"]),
        "video_times": True,
    }


def _published_vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "qwen3_vl",
        **shared_vision_fields(vision),
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vision["d_model"],
        "intermediate_size": vision["d_mlp"],
        "out_hidden_size": vision["d_out"],
        "num_position_embeddings": vision["n_positions"],
        "deepstack_visual_indexes": list(vision["deepstack_layers"]),
    }


def _vision_mlp(cfg: Mapping[str, Any], theirs: str, ours: str) -> list[Rename]:
    width, d_mlp = cfg["d_model"], cfg["d_mlp"]
    return [
        *affine(f"{theirs}.mlp.linear_fc1", (f"{ours}.mlp.in_proj",), (d_mlp, width)),
        *affine(f"{theirs}.mlp.linear_fc2", (f"{ours}.mlp.out_proj",), (width, d_mlp)),
    ]


FAMILY = QwenVL(
    "Qwen3VLForConditionalGeneration",
    "qwen3_vl",
    vision_kwargs=_vision_kwargs,
    vision_mlp=_vision_mlp,
    published_vision=_published_vision,
    dialect=QWEN3,
    nested=True,
    merger=("norm", "linear_fc1", "linear_fc2"),
    n_ctx=128000,
    d_head=128,
    eps=1e-6,
    rope_theta=500000.0,
    mrope_section=(24, 20, 20),
    mrope_interleaved=True,
)
ARCHITECTURES, MODEL_TYPES = (FAMILY.architecture,), (FAMILY.model_type,)
config_kwargs, dtype, published_config = FAMILY.config_kwargs, FAMILY.dtype, FAMILY.published_config
from_hf, to_hf = FAMILY.from_hf, FAMILY.to_hf
