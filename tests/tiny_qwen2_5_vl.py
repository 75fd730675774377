"""Small random Qwen2.5-VL models, and batches as those of tiny_qwen2_vl.py, whose videos last for some time."""

from functools import lru_cache
from typing import Any

import tiny_qwen2_vl
import torch
import transformers
from tiny import reference
from tiny_qwen2_vl import published_positions
from transformers.vision_utils import get_vision_window_index

PATCH, WINDOW, PER_SECOND = 4, 16, 5
SECONDS = (1.0, 0.5, 0.1)
"""From one frame of a video to the next, in the videos of a batch."""


def tiny_config(tied: bool = False, **text: Any) -> "transformers.Qwen2_5_VLConfig":
    """A vision tower of two layers: windows of 4 x 4 patches, then whole pictures."""
    return transformers.Qwen2_5_VLConfig(
        **tiny_qwen2_vl.shared_fields(tied, text),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "window_size": WINDOW,
            "fullatt_block_indexes": [1],
            "tokens_per_second": PER_SECOND,
        },
    )


@lru_cache(maxsize=4)
def tiny_hf(tied: bool = False) -> Any:
    """The reference. Shared: tests must not change its weights."""
    return reference(transformers.Qwen2_5_VLForConditionalGeneration, tiny_config(tied))


def hf_batch(rows: list[list[Any]], seed: int = 0) -> dict[str, torch.Tensor]:
    """As `tiny_qwen2_vl.hf_batch`, with the time between the frames of each video."""
    batch = tiny_qwen2_vl.hf_batch(rows, seed)
    if "video_grid_thw" in batch:
        batch["second_per_grid_ts"] = torch.tensor([SECONDS[i % 3] for i in range(len(batch["video_grid_thw"]))])
    return batch


def for_hf(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the reference takes of a batch, with the published positions."""
    return {**batch, "position_ids": published_positions(batch, per_second=PER_SECOND)}


def in_order(name: str, x: torch.Tensor, grids: tuple[tuple[int, int, int], ...]) -> torch.Tensor:
    """The reference's patches, or tokens, that lie window by window, in the order of the picture."""
    if name == "vision.blocks.0.hook_resid_pre":
        return x
    order, _ = get_vision_window_index(torch.tensor(grids), 2, WINDOW, PATCH)
    tokens = x.unflatten(0, (len(order), -1))
    return tokens[order.argsort()].flatten(0, 1)


CASES = {
    **tiny_qwen2_vl.CASES,
    "windows": [[5, ("image", (1, 14, 22)), 7, ("image", (1, 8, 8)), 8]],
}


@lru_cache(maxsize=1)
def reading_model() -> Any:
    """One with a tokenizer and chat template. Shared."""
    return tiny_qwen2_vl.reading(transformers.Qwen2_5_VLForConditionalGeneration, tiny_config)
