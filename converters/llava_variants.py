"""What differs between LLaVA's families, their language models and their vision towers, as data.

Defaults are those of the configuration classes in transformers 5.23.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hooked_vlm.converters.dialects import LLAMA, MISTRAL, QWEN2, Dialect


@dataclass(frozen=True)
class Variant:
    """What differs between the families."""

    architecture: str
    model_type: str
    processor: str
    image_token_id: int
    feature_layer: int
    tower: str
    """Model type of the vision tower, and of the language model, where config.json does not say it."""
    text: str
    line_break: bool = False
    pinpoints: tuple[tuple[int, int], ...] = ()
    """`image_grid_pinpoints` where config.json does not say them: (height, width) in pixels."""
    video_token_id: int | None = None
    max_grid: int | None = None
    """The number in `vision_aspect_ratio`, where config.json does not say it; None: grids are never resampled."""
    styles: Mapping[str, str] = field(default_factory=dict)
    """Styles of prompts by the model type of the language model, where they are not those of `DIALECTS`."""


LLAVA = Variant("LlavaForConditionalGeneration", "llava", "cropped", 32000, -2, "clip_vision_model", "llama")
NEXT = replace(
    LLAVA,
    architecture="LlavaNextForConditionalGeneration",
    model_type="llava_next",
    processor="anyres",
    line_break=True,
    pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    styles={"mistral": "mistral"},
)
ONEVISION = Variant(
    "LlavaOnevisionForConditionalGeneration",
    "llava_onevision",
    "onevision",
    151646,
    -1,
    "siglip_vision_model",
    "qwen2",
    line_break=True,
    pinpoints=tuple((384 * rows, 384 * cols) for rows in range(1, 7) for cols in range(1, 7)),
    video_token_id=151647,
    max_grid=9,
)
VARIANTS = (LLAVA, NEXT, ONEVISION)
INSTEAD: dict[str, str] = {
    **dict.fromkeys(
        ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM", "LlavaQwenForCausalLM"),
        "is a file of LLaVA's original code, which is not supported: load the same weights from llava-hf, e.g. "
        "llava-hf/llava-1.5-7b-hf instead of liuhaotian/llava-v1.5-7b",
    ),
    "LlavaNextVideoForConditionalGeneration": "is not supported: use llava-hf/llava-onevision-qwen2-7b-ov-hf, which "
    "takes videos, too, or llava-hf/llava-v1.6-vicuna-7b-hf",
    "VideoLlavaForConditionalGeneration": "is not supported: use llava-hf/llava-onevision-qwen2-7b-ov-hf, which takes "
    "videos, too",
    "VipLlavaForConditionalGeneration": "is not supported: use llava-hf/llava-1.5-7b-hf",
}
"""Architectures of the original repositories and of relatives that are not supported, and what to load instead."""

DIALECTS: dict[str, tuple[Dialect, str, dict[str, Any]]] = {
    "llama": (LLAMA, "vicuna", {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000, "eos_token_id": 2,
    }),
    "mistral": (MISTRAL, "vicuna", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "eos_token_id": 2,
    }),
    "qwen2": (QWEN2, "chatml", {
        "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 151936,
    }),
}  # fmt: skip
"""Dialect, style of prompts and default settings of a language model, by its model type."""

LLAMA_STYLES = ((128000, "llama3"), (64000, "chatml"), (0, "vicuna"))
"""Styles of prompts of language models in Llama's dialect (Llama-3, Yi, Vicuna), each from an id of the image's
placeholder on: it is among the first ids behind the language model's own vocabulary."""

UNSTATED = {
    "clip_vision_model": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14,
    },
    "siglip_vision_model": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16,
        "image_size": 384, "patch_size": 14,
    },
}  # fmt: skip
"""The vision tower of a configuration without any."""
