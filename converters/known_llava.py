"""Configurations and sizes of the published LLaVA models."""

from typing import Any

from hooked_vlm.converters.known_sizes import SEEN, KnownModel

VICUNA_13B = {
    "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}  # fmt: skip
VICUNA = {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064}
CLIP = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
"""CLIP ViT-L/14 at 336 pixels."""
SIGLIP = {
    "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
"""SigLIP so400m/14 at 384 pixels, without its last block."""


def _llava(**text: Any) -> dict[str, Any]:
    """The published `config.json`; the sizes differ only in the language model."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", **VICUNA, **text},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": CLIP,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }


def _next(image_token: int, text: dict[str, Any]) -> dict[str, Any]:
    """LLaVA-NeXT's; the sizes differ in the language model and in the placeholder behind its vocabulary."""
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": pinpoints,
        "image_token_index": image_token,
        "model_type": "llava_next",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_image_newline_parameter": True,
        "vision_config": CLIP,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": text["vocab_size"],
    }


def _text(kind: str, sizes: tuple[int, int, int, int, int], vocab: int, n_ctx: int, theta: float, eps: float) -> Any:
    """`sizes`: of the stream and the MLP, numbers of layers, heads and key-value heads."""
    width, mlp, layers, heads, kv_heads = sizes
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "max_position_embeddings": n_ctx,
        "model_type": kind,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "vocab_size": vocab,
    }


def _onevision(sizes: tuple[int, int, int, int, int], vocab: int, tied: bool = False) -> dict[str, Any]:
    """LLaVA-OneVision's; the sizes differ in the language model."""
    text = _text("qwen2", sizes, vocab, 32768, 1e6, 1e-6)
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_grid_pinpoints": [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)],
        "image_token_index": 151646,
        "model_type": "llava_onevision",
        "projector_hidden_act": "gelu",
        "text_config": {**text, "tie_word_embeddings": tied},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_image_newline_parameter": True,
        "video_token_index": 151647,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": SIGLIP,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


_MISTRAL = {
    **_text("mistral", (4096, 14336, 32, 32, 8), 32064, 32768, 1e6, 1e-5),
    "sliding_window": None,
}
_LLAMA3 = _text("llama", (4096, 14336, 32, 32, 8), 128320, 8192, 5e5, 1e-5)
_YI = _text("llama", (7168, 20480, 60, 56, 8), 64064, 4096, 5e6, 1e-5)
_QWEN1_5_72B = _text("qwen2", (8192, 24576, 80, 64, 64), 152128, 32768, 1e6, 1e-6)
_QWEN1_5_110B = _text("qwen2", (8192, 49152, 80, 64, 8), 152128, 32768, 1e6, 1e-6)
_QWEN2_0_5B, _QWEN2_7B = (896, 4864, 24, 14, 2), (3584, 18944, 28, 28, 4)
_QWEN2_72B = (8192, 29568, 80, 64, 8)
_MEMORY = "from memory, not verified"
_SCRIPT = "its vocabulary as the published conversion makes it"

LLAVA: dict[str, KnownModel] = {
    "llava-hf/llava-1.5-7b-hf": KnownModel(_llava(), 7_063_427_072, SEEN),
    "llava-hf/llava-1.5-13b-hf": KnownModel(
        _llava(**VICUNA_13B), 13_351_494_656, "as 7B, the language model's sizes are Vicuna-13B's",
    ),
    "llava-hf/llava-v1.6-mistral-7b-hf": KnownModel(_next(32000, _MISTRAL), 7_566_747_648, SEEN),
    "llava-hf/llava-v1.6-vicuna-7b-hf": KnownModel(
        _next(32000, VICUNA), 7_063_431_168, "language model of llava-1.5-7b-hf, the rest as mistral-7b",
    ),
    "llava-hf/llava-v1.6-vicuna-13b-hf": KnownModel(
        _next(32000, VICUNA | VICUNA_13B), 13_351_499_776, "language model of llava-1.5-13b-hf, the rest as mistral-7b",
    ),
    "llava-hf/llava-v1.6-34b-hf": KnownModel(
        _next(64000, _YI), 34_752_083_968, f"the sizes of Yi-34B; vocabulary and placeholder {_MEMORY}",
    ),
    "llava-hf/llama3-llava-next-8b-hf": KnownModel(
        _next(128256, _LLAMA3), 8_355_276_800, f"the sizes of Llama-3-8B; placeholder {_MEMORY}",
    ),
    "llava-hf/llava-next-72b-hf": KnownModel(
        _next(151646, _QWEN1_5_72B), 72_667_998_208, f"the sizes of Qwen1.5-72B, {_MEMORY}",
    ),
    "llava-hf/llava-next-110b-hf": KnownModel(
        _next(151646, _QWEN1_5_110B), 111_589_992_448, f"the sizes of Qwen1.5-110B, {_MEMORY}",
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": KnownModel(
        _onevision(_QWEN2_0_5B, 152000, tied=True), 893_675_552, f"the sizes of Qwen2-0.5B; {_SCRIPT}",
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": KnownModel(
        _onevision(_QWEN2_7B, 152000), 8_029_890_080, "values seen in public copies; vocab_size not verified",
    ),
    "llava-hf/llava-onevision-qwen2-72b-ov-hf": KnownModel(
        _onevision(_QWEN2_72B, 152128), 73_181_570_592, f"the sizes of Qwen2-72B; {_SCRIPT}",
    ),
}  # fmt: skip
