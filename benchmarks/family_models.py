"""A random model of every family in the middle size of `models.py`, and a prompt about one picture.

Towers have four layers, language models eight; windows, DeepStack, tiles and line breaks are as published.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from models import END, IMAGE, START, batch_of, text_fields
from torch import Tensor

from hooked_vlm import HookedVLM
from hooked_vlm.inputs.processors import processor_of

Batch = dict[str, Tensor]
TEXT = text_fields(num_hidden_layers=8)
SIDE, PATCH = 168, 14
"""Pixels of a side of a tile and of a patch: 144 patches to a tile."""
LINE = 40
WIDE = (2 * SIDE, SIDE)
"""A picture that two tiles show, and one more as a whole."""
TOWER = {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 4, "num_attention_heads": 4}
TILED = {**TOWER, "image_size": SIDE, "patch_size": PATCH}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
MARKS = {
    "image_token_id": IMAGE,
    "video_token_id": 1001,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def _qwen(config_class: Any, rope: dict[str, Any], tower: dict[str, Any]) -> Any:
    tower = {"depth": 4, "hidden_size": 320, "intermediate_size": 1280, "num_heads": 4, "out_hidden_size": 512, **tower}
    rope = {"rope_type": "default", "rope_theta": 1e6, **rope}
    return config_class(text_config={**TEXT, "rope_parameters": rope}, vision_config=tower, **MARKS)


def qwen2_5_vl() -> Any:
    """Windows of 8 x 8 patches in three of four blocks."""
    tower = {"window_size": 112, "fullatt_block_indexes": [3], "hidden_act": "silu"}
    return _qwen(transformers.Qwen2_5_VLConfig, {"mrope_section": [8, 12, 12]}, tower)


def qwen3_vl() -> Any:
    """Features of three blocks enter behind the first three of the language model."""
    tower = {"patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [0, 1, 2]}
    rope = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
    return _qwen(transformers.Qwen3VLConfig, rope, tower)


def internvl3_5() -> Any:
    tower = {**TOWER, "image_size": [448, 448], "patch_size": [PATCH, PATCH], "use_qk_norm": False}
    text = {"model_type": "qwen3", **TEXT}
    return transformers.InternVLConfig(
        text_config=text, vision_config=tower, image_token_id=IMAGE, image_seq_length=256, tie_word_embeddings=False
    )


def llava() -> Any:
    """576 tokens, no grouped queries, one of the tower's blocks not read."""
    tower = {"model_type": "clip_vision_model", **TILED, "image_size": 336}
    text = {"model_type": "llama", **TEXT, "num_key_value_heads": 8}
    return transformers.LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE)


def llava_next() -> Any:
    tower, text = {"model_type": "clip_vision_model", **TILED}, {"model_type": "mistral", **TEXT}
    return transformers.LlavaNextConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS
    )


def onevision() -> Any:
    tower = {"model_type": "siglip_vision_model", **TILED, "vision_use_head": False}
    return transformers.LlavaOnevisionConfig(
        vision_config=tower,
        text_config={"model_type": "qwen2", **TEXT},
        image_token_index=IMAGE,
        video_token_index=1001,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )


def siglip(side: int) -> dict[str, Any]:
    return {"model_type": "siglip_vision_model", **TILED, "image_size": side, "vision_use_head": False}


def gemma3() -> Any:
    """256 tokens that see each other both ways, windows in seven of eight layers."""
    text = {"model_type": "gemma3_text", **TEXT, "head_dim": 128, "sliding_window": 128}
    return transformers.Gemma3Config(
        text_config=text, vision_config=siglip(448), mm_tokens_per_image=256, boi_token_index=START,
        eoi_token_index=END, image_token_index=IMAGE, tie_word_embeddings=False,
    )  # fmt: skip


def paligemma(text: str, **fields: Any) -> Any:
    """256 tokens and a prompt that see each other both ways."""
    return transformers.PaliGemmaConfig(
        text_config={"model_type": text, **TEXT, "head_dim": 64, "num_key_value_heads": 1, **fields},
        vision_config=siglip(224), projection_dim=512, image_token_index=IMAGE, tie_word_embeddings=False,
    )  # fmt: skip


def smolvlm() -> Any:
    """Three tiles of 64 tokens: two of the picture, and the whole."""
    text = {"model_type": "llama", **TEXT, "tie_word_embeddings": False}
    tower = {**TOWER, "image_size": 512, "patch_size": 16}
    return transformers.Idefics3Config(
        text_config=text, vision_config=tower, scale_factor=4, image_token_id=IMAGE, tie_word_embeddings=False
    )


CONFIGS: dict[str, tuple[Callable[[], Any], Any]] = {
    "Qwen2.5-VL": (qwen2_5_vl, transformers.Qwen2_5_VLForConditionalGeneration),
    "Qwen3-VL": (qwen3_vl, transformers.Qwen3VLForConditionalGeneration),
    "InternVL3.5": (internvl3_5, transformers.InternVLForConditionalGeneration),
    "LLaVA-1.5": (llava, transformers.LlavaForConditionalGeneration),
    "LLaVA-NeXT": (llava_next, transformers.LlavaNextForConditionalGeneration),
    "LLaVA-OneVision": (onevision, transformers.LlavaOnevisionForConditionalGeneration),
    "Gemma 3": (gemma3, transformers.Gemma3ForConditionalGeneration),
    "PaliGemma": (partial(paligemma, "gemma"), transformers.PaliGemmaForConditionalGeneration),
    "PaliGemma 2": (partial(paligemma, "gemma2"), transformers.PaliGemmaForConditionalGeneration),
    "SmolVLM": (smolvlm, transformers.Idefics3ForConditionalGeneration),
}


def model_of(family: str, device: str, dtype: torch.dtype) -> Any:
    """The reference with random weights. Its attention is sdpa, or eager where it refuses that (caps on scores)."""
    make, model_class = CONFIGS[family]
    torch.manual_seed(0)
    attention = "eager" if family == "PaliGemma 2" else "sdpa"
    return model_class._from_config(make(), attn_implementation=attention).eval().to(device, dtype)


def prompt_of(family: str, ours: HookedVLM, device: str) -> Batch:
    """Words about one picture of a few hundred tokens, as a Hugging Face processor returns them."""
    vision = ours.cfg.vision
    assert vision is not None
    if vision.patch_order == "blocks":
        return batch_of([(32, 32)], device, d_patch=vision.d_patch)
    side = vision.tile_size or SIDE
    n_tokens = (side // vision.patch_size // vision.token_size) ** 2
    n, sizes, tokens = 1, {}, [START, *[IMAGE] * n_tokens, END]
    if vision.pinpoints:
        processor: Any = processor_of(ours.cfg)
        layout = processor.layout(WIDE)
        tokens = [START, *[IMAGE] * layout.n_tokens, END]
        n, sizes = layout.grid[0], {"image_sizes": torch.tensor([WIDE[::-1]])}
    elif family == "SmolVLM":  # two tiles side by side, a line break, the whole
        tile = [IMAGE] * n_tokens
        n, tokens = 3, [END, START, *tile, END, START, *tile, LINE, END, START, *tile, END]
    elif ours.cfg.bidirectional == "prompt":
        tokens = [IMAGE] * n_tokens
    ids = torch.tensor([[*tokens, *range(2, 34)]])
    if ours.cfg.bidirectional:  # without them the reference runs causally
        sizes["token_type_ids"] = ((ids == IMAGE) & (ours.cfg.bidirectional == "image")).long()
    pixels = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    pixels = pixels[None] if vision.pinpoints or n > 1 else pixels
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **sizes}
    return {name: tensor.to(device) for name, tensor in batch.items()}
