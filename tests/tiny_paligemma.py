"""Small random PaliGemmas, the first and the second: `transformers`' own, and batches as their processor makes them."""

from functools import lru_cache
from typing import Any

import torch
import transformers
from tiny import LANGUAGE_MODEL, reference, spelled
from tiny_gemma3 import SIGLIP, with_offsets

IMAGE = 193
N_TOKENS, SIDE = 16, 32
"""Tokens of a picture, and pixels of its side."""
TEXT: dict[str, Any] = {**LANGUAGE_MODEL, "head_dim": 24, "max_position_embeddings": 256}
TEXTS: dict[str, dict[str, Any]] = {
    "gemma": TEXT,
    "gemma2": {**TEXT, "query_pre_attn_scalar": 20, "sliding_window": 8},
}
"""Gemma 2 has windows in the first and the last of three layers."""


@lru_cache(maxsize=4)
def tiny_hf(text: str = "gemma", tied: bool = True, n_key_value_heads: int = 2) -> Any:
    """PaliGemma ("gemma"; published ones have one key-value head) or PaliGemma 2 ("gemma2"). Shared: tests must not
    change its weights."""
    config = transformers.PaliGemmaConfig(
        text_config={
            **TEXTS[text],
            "num_key_value_heads": n_key_value_heads,
            "model_type": text,
            "tie_word_embeddings": tied,
        },
        vision_config={**SIGLIP, "patch_size": 8},
        projection_dim=64,
        hidden_size=64,
        image_token_index=IMAGE,
        tie_word_embeddings=tied,
    )
    return with_offsets(reference(transformers.PaliGemmaForConditionalGeneration, config))


def paligemma_batch(rows: list[list[Any]], seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch as PaliGemma's processor returns it, padded on the left.

    A row is a list of token ids and of "image", every one of another picture; ("suffix", ids) may end it, which the
    tokens before do not see.
    """
    n_images = sum(item == "image" for row in rows for item in row)
    batch = spelled(rows, lambda item: [IMAGE] * N_TOKENS if item == "image" else list(item[1]))
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    for types, row in zip(batch["token_type_ids"], rows, strict=True):
        if isinstance(row[-1], tuple):
            types[-len(row[-1][1]) :] = 1
    if n_images:
        batch["pixel_values"] = torch.randn(n_images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return batch


def for_hf(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the reference takes of a batch: positions count real tokens from 1 on; it is told what the prompt is."""
    positions = batch["attention_mask"].cumsum(1).clamp(min=1)
    return {**batch, "position_ids": positions}


CASES: dict[str, list[list[Any]]] = {
    "one-image": [["image", 5, 6, 7, 8, 9, 10]],
    "images-of-two-sizes": [["image", "image", 5, 7, 8, 9]],
    "text": [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]],
    "suffix": [["image", 5, 6, ("suffix", [7, 8, 9, 10, 11, 12, 13])], ["image", 9, ("suffix", [10, 11])]],
    "left-padded": [["image", 7, 8], [11, 12, 13], ["image", "image", 9]],
}
