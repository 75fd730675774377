"""Configurations and sizes of the published Qwen-VL models."""

from typing import Any

from hooked_vlm.converters.known_sizes import KnownModel


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
    """The published `config.json`; the three sizes differ only in these values."""
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


def _qwen2_5_vl(*, layers: int, tower_mlp: int = 3420, hidden_size: int, **sizes: Any) -> dict[str, Any]:
    """The published `config.json`: Qwen2-VL's with another tower."""
    config = _qwen2_vl(layers=layers, hidden_size=hidden_size, **sizes)
    vision = {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": tower_mlp,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": hidden_size,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }
    return config | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "max_position_embeddings": 128000,
        "vision_config": vision,
    }


def _qwen3_vl(*, hidden_size: int, layers: int, heads: int, tied: bool, large: bool, **text: int) -> dict[str, Any]:
    """The published `config.json`; `large` is the tower of the larger sizes."""
    tower = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    if not large:
        tower = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": hidden_size,
            "initializer_range": 0.02,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "use_cache": True,
            "vocab_size": 151936,
            **text,
        },
        "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "initializer_range": 0.02,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden_size,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **tower,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


# fmt: off
QWEN_VL: dict[str, KnownModel] = {
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
    "Qwen/Qwen2.5-VL-3B-Instruct": KnownModel(
        _qwen2_5_vl(hidden_size=2048, intermediate_size=11008, layers=36, heads=16, kv_heads=2,
                    vocab_size=151936, tied=True),
        n_params=3_754_622_976,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": KnownModel(
        _qwen2_5_vl(hidden_size=3584, intermediate_size=18944, layers=28, heads=28, kv_heads=4,
                    vocab_size=152064, tied=False),
        n_params=8_292_166_656,
    ),
    "Qwen/Qwen2.5-VL-32B-Instruct": KnownModel(
        _qwen2_5_vl(hidden_size=5120, intermediate_size=27648, layers=64, heads=40, kv_heads=8,
                    vocab_size=152064, tied=False, tower_mlp=3456),
        n_params=33_452_718_336,
        certainty="the language model's sizes are Qwen2.5-32B's; the tower's from memory, not verified",
    ),
    "Qwen/Qwen2.5-VL-72B-Instruct": KnownModel(
        _qwen2_5_vl(hidden_size=8192, intermediate_size=29568, layers=80, heads=64, kv_heads=8,
                    vocab_size=152064, tied=False, tower_mlp=3456),
        n_params=73_410_777_344,
        certainty="the language model's sizes are Qwen2.5-72B's; the tower's from memory, not verified",
    ),
    "Qwen/Qwen3-VL-2B-Instruct": KnownModel(
        _qwen3_vl(hidden_size=2048, intermediate_size=6144, layers=28, heads=16, tied=True, large=False),
        n_params=2_127_532_032, certainty="the language model's sizes are Qwen3-1.7B's; the tower's as in 4B",
    ),
    "Qwen/Qwen3-VL-4B-Instruct": KnownModel(
        _qwen3_vl(hidden_size=2560, intermediate_size=9728, layers=36, heads=32, tied=True, large=False),
        n_params=4_437_815_808, certainty="sizes seen in configurations of fine-tuned models",
    ),
    "Qwen/Qwen3-VL-8B-Instruct": KnownModel(
        _qwen3_vl(hidden_size=4096, intermediate_size=12288, layers=36, heads=32, tied=False, large=True),
        n_params=8_767_123_696,
    ),
    "Qwen/Qwen3-VL-32B-Instruct": KnownModel(
        _qwen3_vl(hidden_size=5120, intermediate_size=25600, layers=64, heads=64, tied=False, large=True),
        n_params=33_357_390_064, certainty="sizes seen in a fine-tuned model's configuration; the tower as in 8B",
    ),
}
# fmt: on
