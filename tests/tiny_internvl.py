"""Small random InternVL models: `transformers`' own, and the same weights in the published layout."""

from functools import lru_cache
from typing import Any

import torch
from tiny import randomise
from transformers import InternVLConfig, InternVLForConditionalGeneration

from hooked_vlm import HookedVLM

IMAGE, IMAGE_START, IMAGE_END, STOP, PAD = 193, 191, 192, 3, 0

SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": STOP,
    "pad_token_id": PAD,
}
SMALL_VIT = {"norm_type": "layer_norm", "attention_bias": True, "use_qk_norm": False}
LARGE_VIT = {"norm_type": "rms_norm", "attention_bias": False, "use_qk_norm": True}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.2],
    "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0],
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}

# name: (text configuration on top of SIZES, vision tower, model type of transformers' text model)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "qwen2": ({"rope_parameters": PLAIN}, SMALL_VIT, "qwen2"),
    "llama": ({"rope_parameters": {**PLAIN, "rope_theta": 5e5}}, LARGE_VIT, "llama"),
    "llama-dynamic": ({"rope_parameters": DYNAMIC}, SMALL_VIT, "llama"),
    "phi3": (
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32, "num_key_value_heads": 4},
        SMALL_VIT,
        "phi3",
    ),
}


def tiny_config(kind: str, **changes: Any) -> InternVLConfig:
    """Three layers and a vision tower of two, tiles of 32 pixels, patches of 4: 16 tokens to a tile."""
    text, vision, model_type = KINDS[kind]
    return InternVLConfig(
        text_config={"model_type": model_type, **SIZES, **text},
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": [32, 32],
            "patch_size": [4, 4],
            "layer_norm_eps": 1e-6,
            **vision,
        },
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
        **changes,
    )


@lru_cache(maxsize=8)
def tiny_hf(kind: str) -> Any:
    """The reference, with attention written out. Shared: tests must not change its weights."""
    model = InternVLForConditionalGeneration._from_config(tiny_config(kind), attn_implementation="eager").eval()
    randomise(model)
    model.generation_config.eos_token_id = STOP
    model.generation_config.pad_token_id = PAD
    return model


@lru_cache(maxsize=8)
def tiny_model(kind: str) -> Any:
    """Ours, on the same storage. Shared: tests must not change its weights and must leave no hooks."""
    return HookedVLM.from_hf(tiny_hf(kind))


def hf_batch(rows: list[list[Any]], seed: int = 0, tile_size: int = 32) -> dict[str, torch.Tensor]:
    """A batch as a Hugging Face processor returns it, padded on the left, with `num_tiles` besides.

    A row is a list of token ids and of ("image", number of tiles).
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = []
    num_tiles: list[int] = []
    per_tile = (tile_size // 8) ** 2
    for row in rows:
        tokens: list[int] = []
        for item in row:
            if isinstance(item, int):
                tokens.append(item)
                continue
            num_tiles.append(item[1])
            tokens += [IMAGE_START, *[IMAGE] * (per_tile * item[1]), IMAGE_END]
        ids.append(tokens)
    width = max(map(len, ids))
    batch = {
        "input_ids": torch.tensor([[PAD] * (width - len(r)) + r for r in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in ids]),
    }
    if num_tiles:
        batch["num_tiles"] = torch.tensor(num_tiles)
        batch["pixel_values"] = torch.randn(sum(num_tiles), 3, tile_size, tile_size, generator=generator)
    return batch


def for_hf(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the reference takes of a batch: positions count real tokens only."""
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**{k: v for k, v in batch.items() if k != "num_tiles"}, "position_ids": positions}


CASES: dict[str, list[list[Any]]] = {
    "one-tile": [[5, 6, ("image", 1), 7, 8, 9, 10]],
    "images-of-different-tiles": [[5, ("image", 3), 7, ("image", 1), 8, 9]],
    "text": [[5, 6, 7, 8, 9, 10, 11]],
    "left-padded": [[5, ("image", 2), 7, 8], [11, 12, 13], [("image", 1), ("image", 1), 9]],
}
