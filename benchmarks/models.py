"""Random models for benchmarks, and inputs as a Hugging Face processor returns them."""

from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

IMAGE, START, END = 1000, 1002, 1003


def middle_size_model(device: str, dtype: torch.dtype) -> Any:
    """8 layers, 8 heads (2 key-value heads), d_model 512; a vision tower of 4 layers."""
    text = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = _config(text, {"depth": 4, "embed_dim": 320, "num_heads": 4}, mrope_section=[8, 12, 12])
    return _random(config, device, dtype)


def deep_model(device: str, dtype: torch.dtype) -> Any:
    """28 layers, 4 heads (2 key-value heads), d_model 64: small matrices, as many steps as in a model of billions."""
    text = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 28, "num_attention_heads": 4}
    config = _config(text, {"depth": 2, "embed_dim": 64, "num_heads": 4}, mrope_section=[2, 3, 3])
    return _random(config, device, dtype)


def few_wide_layers(device: str, dtype: torch.dtype) -> Any:
    """2 layers in the shape of a language model of 1 billion weights, d_model 2048."""
    text = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2, "num_attention_heads": 16}
    config = _config(text, {"depth": 2, "embed_dim": 320, "num_heads": 4}, mrope_section=[16, 24, 24])
    return _random(config, device, dtype)


def one_gigabyte(device: str, dtype: torch.dtype) -> Any:
    """Six such layers: about a gigabyte in float32."""
    text = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6, "num_attention_heads": 16}
    config = _config(text, {"depth": 2, "embed_dim": 320, "num_heads": 4}, mrope_section=[16, 24, 24])
    return _random(config, device, dtype)


def shape_of_2b(device: str, dtype: torch.dtype) -> Any:
    """Random weights in the shape of Qwen2-VL-2B."""
    text = {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "max_position_embeddings": 32768,
    }
    tower = {"depth": 32, "embed_dim": 1280, "num_heads": 16}
    config = _config(text, tower, mrope_section=[16, 24, 24], tie_word_embeddings=True)
    return _random(config, device, dtype)


def shape_of_7b(device: str, dtype: torch.dtype) -> Any:
    """Random weights in the shape of Qwen2-VL-7B."""
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
    }
    config = _config(text, {"depth": 32, "embed_dim": 1280, "num_heads": 16}, mrope_section=[16, 24, 24])
    return _random(config, device, dtype)


def tiny_model(device: str, dtype: torch.dtype) -> Any:
    """2 layers, 4 heads (2 key-value heads), d_model 64: to see that a benchmark runs from end to end."""
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = _config(text, {"depth": 2, "embed_dim": 64, "num_heads": 4}, mrope_section=[2, 3, 3])
    return _random(config, device, dtype)


def text_fields(**sizes: int) -> dict[str, int]:
    """Fields of a language model's configuration: the middle size, where not given."""
    return {
        "vocab_size": 1100,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16384,
        "bos_token_id": 1,
        "eos_token_id": 1099,
        "pad_token_id": 0,
        **sizes,
    }


def _config(text: dict[str, int], tower: dict[str, int], mrope_section: list[int], **settings: Any) -> Qwen2VLConfig:
    """What the models have in common, and the sizes of one."""
    return Qwen2VLConfig(
        text_config={
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope_section},
            **text_fields(**text),
        },
        vision_config={"hidden_size": text["hidden_size"], **tower},
        image_token_id=IMAGE,
        video_token_id=1001,
        vision_start_token_id=START,
        vision_end_token_id=END,
        **settings,
    )


def _random(config: Qwen2VLConfig, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen2VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)


MODELS = {"middle": middle_size_model, "2b": shape_of_2b}


def batch_of(
    grids: list[tuple[int, int]], device: str, n_text: int = 32, d_patch: int = 1176
) -> dict[str, torch.Tensor]:
    """One prompt for each grid of patches (rows, columns), padded on the left."""
    rows = [[START, *[IMAGE] * (h * w // 4), END, *range(2, 2 + n_text)] for h, w in grids]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    pixels = torch.randn(sum(h * w for h, w in grids), d_patch, generator=torch.Generator().manual_seed(0))
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([(1, h, w) for h, w in grids]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}
