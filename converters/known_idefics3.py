"""Configurations and sizes of the published Idefics3 and SmolVLM models."""

from typing import Any

from hooked_vlm.converters.known_sizes import KnownModel

_SO400M = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27,
    "patch_size": 14,
}  # fmt: skip
"""SigLIP so400m/14."""
_BASE = {
    "hidden_size": 768, "image_size": 512, "intermediate_size": 3072, "num_attention_heads": 12,
    "num_hidden_layers": 12, "patch_size": 16,
}  # fmt: skip
"""SigLIP base/16 at 512 pixels."""
_135M, _360M = (576, 1536, 30, 9, 3), (960, 2560, 32, 15, 5)
_1_7B, _LLAMA3_8B = (2048, 8192, 24, 32, 32), (4096, 14336, 32, 32, 8)
"""Of SmolLM2 and Llama 3: widths of the stream and the MLP, numbers of layers, heads and key-value heads."""
_LLAMA3_1 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
"""How Llama 3.1 scales rotary positions."""


def _idefics3(
    sizes: tuple[int, int, int, int, int],
    theta: float,
    vision: dict[str, Any],
    scale: int,
    *,
    vocab: int = 49280,
    image_token: int = 49190,
    n_ctx: int = 8192,
    pad: int = 2,
    scaling: dict[str, Any] | None = None,
    second: bool = False,
) -> dict[str, Any]:
    """The published `config.json`, reduced to the fields that describe the model; `second`: of SmolVLM2."""
    width, mlp, layers, heads, kv_heads = sizes
    return {
        "architectures": ["SmolVLMForConditionalGeneration" if second else "Idefics3ForConditionalGeneration"],
        "image_token_id": image_token,
        "model_type": "smolvlm" if second else "idefics3",
        "scale_factor": scale,
        "text_config": {
            "head_dim": width // heads,
            "hidden_size": width,
            "intermediate_size": mlp,
            "max_position_embeddings": n_ctx,
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "pad_token_id": pad,
            "rms_norm_eps": 1e-05,
            **({} if scaling is None else {"rope_scaling": scaling}),
            "rope_theta": theta,
            "vocab_size": vocab,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "smolvlm_vision" if second else "idefics3_vision", **vision},
    }


_LARGE = {**_SO400M, "image_size": 384}
_COPIES = "values seen in public copies"
_MEMORY = "from memory, not verified"
_AS_FIRST = "the sizes of {} (the same language model and tower), {}"

IDEFICS3: dict[str, KnownModel] = {
    "HuggingFaceM4/Idefics3-8B-Llama3": KnownModel(
        _idefics3(
            _LLAMA3_8B, 5e5, {**_SO400M, "image_size": 364}, 2, vocab=128259, image_token=128257, n_ctx=131072,
            pad=128002, scaling=_LLAMA3_1,
        ),
        8_462_086_384,
        f"the sizes of Llama-3.1-8B and SigLIP so400m; vocabulary, context, its scaling of positions {_MEMORY}",
    ),
    "HuggingFaceTB/SmolVLM-Instruct": KnownModel(
        _idefics3(_1_7B, 273768.0, _LARGE, 3, vocab=49155, image_token=49153, n_ctx=16384),
        2_246_272_880,
        f"the sizes of SmolLM2-1.7B and SigLIP so400m; vocabulary, context and rope_theta {_MEMORY}",
    ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": KnownModel(_idefics3(_135M, 1e5, _BASE, 4), 256_484_928, _COPIES),
    "HuggingFaceTB/SmolVLM-500M-Instruct": KnownModel(_idefics3(_360M, 1e5, _BASE, 4), 507_482_304, _COPIES),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": KnownModel(
        _idefics3(_1_7B, 130000.0, _LARGE, 3, second=True),
        2_246_784_880,
        f"the sizes of SmolLM2-1.7B and SigLIP so400m; vocabulary and rope_theta {_MEMORY}",
    ),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": KnownModel(
        _idefics3(_360M, 1e5, _BASE, 4, second=True), 507_482_304, _AS_FIRST.format("SmolVLM-500M-Instruct", _MEMORY),
    ),
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": KnownModel(
        _idefics3(_135M, 1e5, _BASE, 4, second=True), 256_484_928, _AS_FIRST.format("SmolVLM-256M-Instruct", _MEMORY),
    ),
}  # fmt: skip
