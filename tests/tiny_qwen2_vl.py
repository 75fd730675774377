"""Small random Qwen2-VL models and inputs, made on the spot and shared by the tests.

Models and inputs are typed `Any`: tests reach into modules and optional fields.
"""

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import LANGUAGE_MODEL, randomise, reference, spelled

from hooked_vlm import HookedVLM
from hooked_vlm.inputs.image_processor import ImageProcessor
from tools.toy_training import qwen2_vl as toy
from tools.toy_training.tokenizer import END_OF_TEXT, IM_END, save_tokenizer

IMAGE, VIDEO, VISION_START, VISION_END = 100, 101, 102, 103


def shared_fields(tied: bool, text: dict[str, Any]) -> dict[str, Any]:
    """The language model, and the tokens of pictures."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    return {
        "text_config": {**LANGUAGE_MODEL, "max_position_embeddings": 512, "rope_parameters": rope, **text},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": tied,
    }


def tiny_config(tied: bool = False, **text: Any) -> "transformers.Qwen2VLConfig":
    """A vision tower of two layers."""
    return transformers.Qwen2VLConfig(
        **shared_fields(tied, text),
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 4,
            "patch_size": 4,
        },
    )


@lru_cache(maxsize=4)
def tiny_hf(tied: bool = False) -> Any:
    """The reference. Shared: tests must not change its weights."""
    return reference(transformers.Qwen2VLForConditionalGeneration, tiny_config(tied))


@lru_cache(maxsize=4)
def tiny_model(tied: bool = False) -> Any:
    """Ours, on the same storage. Shared: tests must not change its weights and must leave no hooks."""
    return HookedVLM.from_hf(tiny_hf(tied))


def hf_batch(rows: list[list[Any]], seed: int = 0, d_patch: int = 96, marked: bool = True) -> dict[str, torch.Tensor]:
    """A batch as a Hugging Face processor returns it, padded on the left.

    A row is a list of token ids and of grids: ("image", (1, h, w)) or ("video", (t, h, w)), between the tokens that
    open and close a picture if `marked`.
    """
    opened, closed = ([VISION_START], [VISION_END]) if marked else ([], [])
    generator = torch.Generator().manual_seed(seed)
    grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}

    def placeholders(item: tuple[str, tuple[int, int, int]]) -> list[int]:
        kind, (t, h, w) = item
        grids[kind].append((t, h, w))
        return [*opened, *[IMAGE if kind == "image" else VIDEO] * (t * h * w // 4), *closed]

    batch = spelled(rows, placeholders)
    for kind, pixels, thw in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if grids[kind]:
            batch[thw] = torch.tensor(grids[kind])
            n = int(batch[thw].prod(1).sum())
            batch[pixels] = torch.randn(n, d_patch, generator=generator)
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int() + 2 * (batch["input_ids"] == VIDEO).int()
    return batch


ONE_IMAGE = [[5, 6, ("image", (1, 4, 6)), 7, 8, 9, 10]]
TWO_IMAGES = [[5, ("image", (1, 4, 6)), 7, ("image", (1, 8, 4)), 8, 9, 10]]
TEXT = [[5, 6, 7, 8, 9, 10, 11]]
PADDED = [[5, 6, ("image", (1, 4, 6)), 7, 8], [11, 12, 13], [5, ("image", (1, 4, 4)), ("image", (1, 2, 6)), 9]]
VIDEO_CLIP = [[5, ("video", (2, 4, 6)), 7, 8, ("image", (1, 4, 4)), 9]]
LONG_VIDEO = [[5, ("video", (7, 4, 4)), 7, 8, 9]]
PADDED_VIDEOS = [[5, ("video", (3, 4, 2)), 6, 7], [8, ("image", (1, 6, 4)), 9, ("video", (5, 4, 2)), 10, 11, 12]]

CASES: dict[str, list[list[Any]]] = {
    "one-image": ONE_IMAGE,
    "images-of-two-sizes": TWO_IMAGES,
    "text": TEXT,
    "left-padded": PADDED,
    "video-and-image": VIDEO_CLIP,
    "long-video": LONG_VIDEO,
    "padded-videos": PADDED_VIDEOS,
}


def published_positions(
    batch: dict[str, torch.Tensor], merge: int = 2, per_second: float | None = None
) -> torch.Tensor:
    """M-RoPE position ids [3, batch, pos] by the rule of the published code, counted token by token.

    `per_second` positions are those of a second of video, where a frame does not simply count one.
    """
    seconds = iter(batch.get("second_per_grid_ts", torch.zeros(0)).tolist())
    grids = {
        IMAGE: iter(batch.get("image_grid_thw", torch.zeros(0, 3)).tolist()),
        VIDEO: iter(batch.get("video_grid_thw", torch.zeros(0, 3)).tolist()),
    }
    ids = torch.zeros(3, *batch["input_ids"].shape, dtype=torch.long)
    for row, (tokens, mask) in enumerate(
        zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    ):
        triples: list[tuple[int, int, int]] = []
        real = [token for token, is_real in zip(tokens, mask, strict=True) if is_real]
        while len(triples) < len(real):
            token = real[len(triples)]
            following = 1 + max((max(triple) for triple in triples), default=-1)
            if token not in grids:
                triples.append((following, following, following))
                continue
            t, h, w = map(int, next(grids[token]))
            step = next(seconds) * per_second if per_second is not None and token == VIDEO else 1
            for frame in range(t):
                for y in range(h // merge):
                    for x in range(w // merge):
                        triples.append((following + int(frame * step), following + y, following + x))
        ids[:, row, torch.tensor(mask).bool()] = torch.tensor(triples).T
    return ids


def for_hf(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the reference takes of a batch: the published positions, since release 5 ignores a video's length."""
    return {**batch, "position_ids": published_positions(batch)}


def inputs(rows: list[list[Any]], seed: int = 0, tied: bool = False) -> Any:
    """`hf_batch(rows)` as inputs of the tiny model."""
    return tiny_model(tied).inputs_from_hf(hf_batch(rows, seed))


def reading(model_class: Any, tiny_config: Any, template: str = toy.CHAT_TEMPLATE) -> Any:
    """A tiny model of a family with the toy models' tokenizer, 8 pixels to a token."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), toy.SPECIAL_TOKENS, chat_template=template)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in toy.SPECIAL_TOKENS}
    config = tiny_config(vocab_size=len(tokenizer), eos_token_id=ids[IM_END], pad_token_id=ids[END_OF_TEXT])
    config.image_token_id, config.video_token_id = ids[toy.IMAGE_PAD], ids[toy.VIDEO_PAD]
    config.vision_start_token_id, config.vision_end_token_id = ids[toy.VISION_START], ids[toy.VISION_END]
    hf = model_class(config).eval()
    randomise(hf)
    return HookedVLM.from_hf(hf, tokenizer, ImageProcessor(patch_size=4, min_pixels=256, max_pixels=64 * 400))


@lru_cache(maxsize=1)
def reading_model() -> Any:
    """One of Qwen2-VL, with its chat template. Shared."""
    return reading(transformers.Qwen2VLForConditionalGeneration, tiny_config)
