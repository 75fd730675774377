"""Published models as data: their configuration and size, without a download."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownModel:
    """One published checkpoint."""

    config: dict[str, Any]
    """Its `config.json`."""
    n_params: int
    """Parameters, a tied matrix counted once."""


def _qwen2_vl(
    *,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab_size: int,
    tied: bool,
) -> dict[str, Any]:
    """The published `config.json`: the three sizes differ in these values only."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocab_size,
    }


# fmt: off
KNOWN_MODELS: dict[str, KnownModel] = {
    "Qwen/Qwen2-VL-2B-Instruct": KnownModel(
        _qwen2_vl(hidden_size=1536, intermediate_size=8960, layers=28, heads=12, kv_heads=2,
                  vocab_size=151936, tied=True),
        n_params=2_208_985_600,
    ),
    "Qwen/Qwen2-VL-7B-Instruct": KnownModel(
        _qwen2_vl(hidden_size=3584, intermediate_size=18944, layers=28, heads=28, kv_heads=4,
                  vocab_size=152064, tied=False),
        n_params=8_291_375_616,
    ),
    "Qwen/Qwen2-VL-72B-Instruct": KnownModel(
        _qwen2_vl(hidden_size=8192, intermediate_size=29568, layers=80, heads=64, kv_heads=8,
                  vocab_size=152064, tied=False),
        n_params=73_405_560_320,
    ),
}
# fmt: on
