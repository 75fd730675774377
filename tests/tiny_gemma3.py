"""A small random Gemma 3: `transformers`' own, and batches as its processor makes them.

A picture of 8 x 8 patches becomes 16 tokens, more than the windows of the first and the last layer hold.
"""

from functools import lru_cache
from typing import Any

import torch
import transformers
from tiny import LANGUAGE_MODEL, reference, spelled
from tiny_llava import for_hf as with_positions

OPENS, CLOSES, IMAGE = 191, 192, 193
N_TOKENS, SIDE = 16, 32
"""Tokens of a picture, and pixels of its side."""
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 4,
    "vision_use_head": False,
}
TEXT: dict[str, Any] = {
    **LANGUAGE_MODEL,
    "head_dim": 24,
    "max_position_embeddings": 256,
    "query_pre_attn_scalar": 20,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}
"""Windows in the first and the last of three layers; the heads together are wider than the stream."""


def with_offsets(hf: Any) -> Any:
    """The same model, its RMSNorms multiplying by about 1: by 1 + weight."""
    with torch.no_grad():
        for module in hf.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.weight.sub_(1)
    return hf


@lru_cache(maxsize=2)
def tiny_hf(tied: bool = True) -> Any:
    """Shared: tests must not change its weights."""
    config = transformers.Gemma3Config(
        text_config={**TEXT, "model_type": "gemma3_text", "tie_word_embeddings": tied},
        vision_config=SIGLIP,
        mm_tokens_per_image=N_TOKENS,
        boi_token_index=OPENS,
        eoi_token_index=CLOSES,
        image_token_index=IMAGE,
        tie_word_embeddings=tied,
    )
    return with_offsets(reference(transformers.Gemma3ForConditionalGeneration, config))


def gemma3_batch(rows: list[list[Any]], seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch as Gemma 3's processor returns it, padded on the left.

    A row is a list of token ids and of "image", every one of another picture, between the tokens around pictures.
    """
    n_images = sum(item == "image" for row in rows for item in row)
    batch = spelled(rows, lambda _: [OPENS, *[IMAGE] * N_TOKENS, CLOSES])
    batch["token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    if n_images:
        batch["pixel_values"] = torch.randn(n_images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return batch


def for_hf(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the reference takes of a batch: positions count real tokens only, and it is told which tokens are images."""
    return {**with_positions(batch), "token_type_ids": (batch["input_ids"] == IMAGE).long()}


CASES: dict[str, list[list[Any]]] = {
    "one-image": [[5, 6, "image", 7, 8, 9, 10]],
    "images-of-two-sizes": [[5, "image", 7, "image", 8, 9]],
    "text": [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]],
    "left-padded": [[5, "image", 7, 8], [11, 12, 13], ["image", "image", 9]],
}
