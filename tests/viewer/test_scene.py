"""Which pixels an image token is drawn on: pictures in which every token has a colour of its own."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hooked_vlm import GeometryError, HookedVLM, InputError
from hooked_vlm.inputs.seen_pictures import seen_picture
from hooked_vlm.viewer.scene import data_url, scene_of

SIZES = {"toy-qwen2-vl": [(128, 96), (160, 112)], "toy-internvl2": [(128, 128), (256, 128), (128, 384)]}
CASES = [(family, size) for family, sizes in SIZES.items() for size in sizes]


def coloured(size: tuple[int, int], side: int = 16) -> Image.Image:
    """Squares of distinct colours, as large as the toy models' tokens."""
    cols, rows = size[0] // side, size[1] // side
    colours = np.random.default_rng(0).permutation(np.indices((8, 8, 8)).reshape(3, -1).T * 36)
    squares = colours[: cols * rows].reshape(rows, cols, 3).astype(np.uint8)
    return Image.fromarray(squares.repeat(side, 0).repeat(side, 1))


def made(family: str, *pictures: Any) -> tuple[Any, Any]:
    model = HookedVLM.from_pretrained(family)
    return model, model.to_inputs("What is it?", images=list(pictures))


def seen_by_token(model: Any, inputs: Any) -> np.ndarray:
    """The mean colour of the pixels that each image token is made from, read off `pixel_values`: [token, 3]."""
    processor, pixels = inputs.spec.image_processor, inputs.pixel_values.numpy()
    if model.cfg.vision.patch_order == "blocks":  # the four patches of a token follow each other
        colours = pixels.reshape(-1, 4, 3, 2, 8, 8).mean((1, 3, 4, 5))
    else:  # the tokens of a tile, row by row
        side = model.cfg.vision.tile_size // 16
        colours = pixels.reshape(-1, 3, side, 16, side, 16).mean((3, 5)).transpose(0, 2, 3, 1).reshape(-1, 3)
    return (colours * processor.image_std + processor.image_mean) * 255


@pytest.mark.parametrize(("family", "size"), CASES)
def test_a_tokens_box_holds_the_pixels_it_was_made_from(family: str, size: tuple[int, int]) -> None:
    picture = coloured(size)
    model, inputs = made(family, picture)
    scene, seen, pixels = scene_of(inputs, picture), seen_by_token(model, inputs), np.asarray(picture, np.float64)
    assert scene.n_tokens == len(seen) == len(inputs.image_tokens(0))
    for panel in scene.panels:
        area = np.zeros(pixels.shape[:2])
        for token, box in enumerate(panel.boxes):
            x0, y0, x1, y1 = box.astype(int)
            area[y0:y1, x0:x1] += 1
            mean = pixels[y0:y1, x0:x1].mean((0, 1))
            # a thumbnail is the picture resized: its tokens blend at their borders
            np.testing.assert_allclose(seen[panel.tokens[token]], mean, atol=40 if "thumb" in panel.label else 1)
        assert (area == 1).all()


def test_tiles_and_thumbnail_are_pictures_of_their_own() -> None:
    _, inputs = made("toy-internvl2", coloured((256, 128)), coloured((128, 128)))
    panels = scene_of(inputs).panels
    assert [(p.label, p.picture, p.tokens[0], len(p.boxes), p.tiles) for p in panels] == [
        ("image 0, tiles", 0, 0, 128, (2, 1)),
        ("image 0, thumbnail", 0, 128, 64, (1, 1)),
        ("image 1", 1, 192, 64, (1, 1)),
    ]


@pytest.mark.parametrize(("family", "size"), CASES)
def test_the_picture_is_found_in_the_pixels_the_model_saw(family: str, size: tuple[int, int]) -> None:
    picture = coloured(size)
    _, inputs = made(family, coloured((128, 128)), picture)
    np.testing.assert_allclose(np.asarray(seen_picture(inputs, 1), float), np.asarray(picture, float), atol=1)


def test_evidence_is_the_tokens_of_the_boxes() -> None:
    _, inputs = made("toy-qwen2-vl", coloured((128, 96)), coloured((128, 96)))
    scene = scene_of(inputs, boxes={1: [(17, 18, 30, 31), (0, 32, 128, 96)]})
    assert scene.evidence == ((), ((17, 18, 30, 31), (0, 32, 128, 96)))
    assert scene.evidence_tokens == (
        48 + 9,
        *range(48 + 16, 48 + 48),
    )  # one token around a small box, all in a large one
    assert scene_of(inputs, boxes=[(17, 18, 30, 31)]).evidence_tokens == (9,)


def test_what_does_not_belong_to_the_inputs_is_refused() -> None:
    _, inputs = made("toy-qwen2-vl", coloured((128, 96)))
    with pytest.raises(InputError, match=r"128 x 128.*128 x 96"):
        scene_of(inputs, coloured((128, 128)))
    with pytest.raises(InputError, match=r"2 pictures.*1"):
        scene_of(inputs, [coloured((128, 96))] * 2)
    with pytest.raises(InputError, match=r"boxes.*1"):
        scene_of(inputs, boxes={1: [(0, 0, 5, 5)]})
    with pytest.raises(GeometryError, match=r"200.*128 x 96"):
        scene_of(inputs, boxes=[(200, 0, 210, 5)])
    with pytest.raises(InputError, match="images="):
        scene_of(replace(inputs, spec=replace(inputs.spec, image_processor=None)))


def test_large_pictures_are_reduced() -> None:
    url = data_url(Image.new("RGB", (4000, 3000), "red"))
    assert url.startswith("data:image/jpeg;base64,") and len(url) < 100_000
    assert data_url(Image.new("RGB", (128, 96))).startswith("data:image/png;base64,")
