"""M-RoPE positions where `<|vision_start|>` is missing or shared, by the rule of the published code."""

import random
from itertools import pairwise
from typing import Any

import pytest
import tiny_qwen2_vl as tiny
import torch
from tiny_qwen2_vl import IMAGE, VIDEO, VISION_END, VISION_START, tiny_model

Row = list[Any]


def published(tokens: list[int], images: list[Any], videos: list[Any]) -> torch.Tensor:
    """Positions [3, pos] of one row as `get_rope_index` of transformers 4.45 walks through it (rewritten).

    It counts the pictures that stand right behind a `<|vision_start|>`, and gives that many, from the first one found,
    positions on three axes.
    """
    behind = [after for before, after in pairwise(tokens) if before == VISION_START]
    left = {IMAGE: behind.count(IMAGE), VIDEO: behind.count(VIDEO)}
    grids = {IMAGE: iter(images), VIDEO: iter(videos)}
    columns: list[tuple[int, ...]] = []
    while left[IMAGE] + left[VIDEO]:
        done = len(columns)
        token, at = min(((kind, tokens.index(kind, done)) for kind in left if left[kind]), key=lambda found: found[1])
        left[token] -= 1
        following = max((max(column) for column in columns), default=-1) + 1
        columns += [(following + i,) * 3 for i in range(at - done)]
        following += at - done
        t, h, w = next(grids[token])
        columns += [
            (following + a, following + b, following + c)
            for a in range(t)
            for b in range(h // 2)
            for c in range(w // 2)
        ]
    following = max((max(column) for column in columns), default=-1) + 1
    columns += [(following + i,) * 3 for i in range(len(tokens) - len(columns))]
    return torch.tensor(columns).T


IMAGE_A, IMAGE_B, CLIP = ("image", (1, 4, 6)), ("image", (1, 8, 4)), ("video", (3, 4, 4))
ROWS: dict[str, Row] = {
    "marked": [5, VISION_START, IMAGE_A, VISION_END, 6, VISION_START, IMAGE_B, VISION_END, 7],
    "missing": [5, 6, IMAGE_A, 7, 8],
    "missing at the very beginning": [IMAGE_A, 7, 8],
    "missing before the first": [5, IMAGE_A, 6, VISION_START, IMAGE_B, VISION_END, 7],
    "missing before the second": [5, VISION_START, IMAGE_A, VISION_END, 6, IMAGE_B, 7],
    "shared by two images": [5, VISION_START, IMAGE_A, IMAGE_B, VISION_END, 7],
    "shared by two, a third marked": [
        VISION_START,
        IMAGE_A,
        IMAGE_B,
        VISION_END,
        7,
        VISION_START,
        IMAGE_A,
        VISION_END,
        8,
    ],
    "shared by an image and a video": [VISION_START, IMAGE_A, CLIP, VISION_END, 7],
    "a video without": [5, CLIP, 6, VISION_START, IMAGE_A, VISION_END, 7],
    "an image without, a video with": [5, IMAGE_A, 6, VISION_START, CLIP, VISION_END, 7],
    "a token between": [5, VISION_START, 9, IMAGE_A, VISION_END, 7],
    "marks without a picture": [5, VISION_START, VISION_END, 6, IMAGE_A, 7, VISION_START],
}


def expected_positions(batch: dict[str, torch.Tensor], rows: list[Row]) -> torch.Tensor:
    positions = torch.zeros(3, *batch["input_ids"].shape, dtype=torch.long)
    for r, row in enumerate(rows):
        real = batch["attention_mask"][r].bool()
        grids = [
            [grid for kind, grid in (i for i in row if not isinstance(i, int)) if kind == k] for k in ("image", "video")
        ]
        positions[:, r, real] = published(batch["input_ids"][r][real].tolist(), *grids)
    return positions


@pytest.mark.parametrize("name", ROWS)
def test_positions_are_those_of_the_version_that_the_model_was_trained_with(name: str) -> None:
    batch = tiny.hf_batch([ROWS[name]], marked=False)
    inputs = tiny_model().inputs_from_hf(batch)
    assert torch.equal(inputs.position_ids, expected_positions(batch, [ROWS[name]]))
    assert torch.equal(inputs.next_position, inputs.position_ids.amax((0, 2)) + 1)


def test_a_row_of_a_batch_is_positioned_as_alone() -> None:
    rows = list(ROWS.values())
    batch = tiny.hf_batch(rows, marked=False)
    inputs = tiny_model().inputs_from_hf(batch)
    assert torch.equal(inputs.position_ids, expected_positions(batch, rows))
    for r, row in enumerate(rows):
        alone = tiny_model().inputs_from_hf(tiny.hf_batch([row], marked=False))
        assert torch.equal(alone.position_ids[:, 0], inputs.position_ids[:, r, inputs.attention_mask[r].bool()])


def test_any_arrangement_of_marks_is_positioned_as_published() -> None:
    choose = random.Random(0)
    pieces: Row = [5, VISION_START, VISION_START, VISION_END, IMAGE_A, IMAGE_B, CLIP]
    for _ in range(300):
        row = [*choose.choices(pieces, k=choose.randrange(12)), 5]
        batch = tiny.hf_batch([row], marked=False)
        assert torch.equal(tiny_model().inputs_from_hf(batch).position_ids, expected_positions(batch, [row])), row


def test_a_prompt_whose_text_marks_no_picture_gets_plain_positions() -> None:
    model = tiny.reading_model()
    text = f"a {model.image_token} b"
    inputs = model.to_inputs(text, images=torch.zeros(16, 24, 3), chat=False)
    assert torch.equal(inputs.position_ids[0, 0], torch.arange(inputs.shape[1]))
    assert torch.equal(inputs.position_ids[1], inputs.position_ids[0])
