"""Configurations and sizes of the published Gemma 3 and PaliGemma models."""

from typing import Any

from hooked_vlm.converters.known_sizes import SEEN, KnownModel

SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model", "num_attention_heads": 16,
    "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
"""SigLIP so400m/14."""
_12B = {
    "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "num_hidden_layers": 48,
    "num_key_value_heads": 8,
}  # fmt: skip
_27B = {
    "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
    "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
}  # fmt: skip
_GEMMA_2B = {
    "hidden_size": 2048, "intermediate_size": 16384, "model_type": "gemma", "num_attention_heads": 8,
    "num_hidden_layers": 18, "num_key_value_heads": 1,
}  # fmt: skip
_GEMMA2_2B = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_hidden_layers": 26,
    "num_key_value_heads": 4,
}  # fmt: skip
_GEMMA2_9B = {
    "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16, "num_hidden_layers": 42,
    "num_key_value_heads": 8,
}  # fmt: skip
_GEMMA2_27B = {
    "head_dim": 128, "hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32,
    "num_hidden_layers": 46, "num_key_value_heads": 16, "query_pre_attn_scalar": 144,
}  # fmt: skip
_GEMMA2 = {
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma2", "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip
_MEMORY = "from memory, not verified"


def _gemma3(sizes: dict[str, Any], instructed: bool) -> dict[str, Any]:
    """The published `config.json`, which leaves what is not here to the class."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106] if instructed else 1,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            **sizes,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {**SIGLIP, "image_size": 896},
    }


def _paligemma(text: dict[str, Any], side: int, dtype: str) -> dict[str, Any]:
    """Of pictures of `side` x `side` pixels."""
    width = text["hidden_size"]
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "image_token_index": 257152,
        "model_type": "paligemma",
        "pad_token_id": 0,
        "projection_dim": width,
        "text_config": {**text, "vocab_size": 257216},
        "torch_dtype": dtype,
        "vision_config": {**SIGLIP, "image_size": side, "projection_dim": width},
    }


def _gemma3s(size: str, sizes: dict[str, Any], n_params: int, certainty: str) -> dict[str, KnownModel]:
    tuned, base = (_gemma3(sizes, instructed) for instructed in (True, False))
    return {
        f"google/gemma-3-{size}-it": KnownModel(tuned, n_params, certainty),
        f"google/gemma-3-{size}-pt": KnownModel(base, n_params, f"as {size}-it; its stop token {_MEMORY}"),
    }


def _paligemmas(
    name: str, text: dict[str, Any], dtype: str, certainty: dict[str, str], n_params: tuple[int, int, int]
) -> dict[str, KnownModel]:
    """Pretrained ("pt") at three sizes of pictures, and tuned on a mix of tasks ("mix") at the smaller two.

    Args:
        certainty: by kind and size of pictures; "" of all others.
        n_params: at 224, 448 and 896 pixels.
    """
    known = {}
    for kind, n in (("pt", 3), ("mix", 2)):
        for side, params in zip((224, 448, 896)[:n], n_params[:n], strict=True):
            of = f"{kind}-{side}"
            config = _paligemma(text, side, dtype)
            known[f"google/{name}-{of}"] = KnownModel(config, params, certainty.get(of, certainty[""]))
    return known


GEMMA: dict[str, KnownModel] = {
    **_gemma3s("4b", {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}, 4_300_079_472, SEEN),
    **_gemma3s("12b", _12B, 12_187_325_040, "sizes seen in public copies; numbers of heads not verified"),
    **_gemma3s("27b", _27B, 27_432_406_640, f"sizes seen in public copies; number of layers and window {_MEMORY}"),
    **_paligemmas("paligemma-3b", _GEMMA_2B, "float32", {
        "mix-224": f"{SEEN}; dtype {_MEMORY}", "": f"as mix-224, for larger or other pictures; dtype {_MEMORY}",
    }, (2_923_466_480, 2_924_351_216, 2_927_890_160)),
    **_paligemmas("paligemma2-3b", _GEMMA2 | _GEMMA2_2B, "bfloat16", {
        "mix-448": f"{SEEN}; dtype {_MEMORY}", "": f"as mix-448, for pictures of another size; dtype {_MEMORY}",
    }, (3_032_242_416, 3_033_127_152, 3_036_666_096)),
    **_paligemmas("paligemma2-10b", _GEMMA2 | _GEMMA2_9B, "bfloat16", {
        "": f"the sizes of Gemma-2-9B, {_MEMORY}",
    }, (9_662_638_832, 9_663_523_568, 9_667_062_512)),
    **_paligemmas("paligemma2-28b", _GEMMA2 | _GEMMA2_27B, "bfloat16", {
        "": f"the sizes of Gemma-2-27B, {_MEMORY}",
    }, (27_650_487_024, 27_651_371_760, 27_654_910_704)),
}  # fmt: skip
