"""Tiles against the published rule and `transformers`' Pillow processor; their geometry, there and back."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_internvl import tiny_model
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from hooked_vlm.errors import GeometryError, ImageError
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.layouts import tiled_layout
from hooked_vlm.inputs.tiles import IMAGENET_MEAN, IMAGENET_STD, TileProcessor

SIZES = [(448, 448), (1000, 300), (300, 1000), (500, 400), (64, 64), (1344, 896), (37, 900), (897, 449), (2, 3)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# executed shape annotations look at random entries of tuples, and layouts are made inside of strategies
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


def published_layout(width: int, height: int, least: int, most: int, size: int) -> tuple[int, int]:
    """The rule in words: the closest aspect ratio; of equals, the larger grid if the image fills half of it."""
    candidates = [(c, r) for c, r in itertools.product(range(1, most + 1), repeat=2) if least <= c * r <= most]
    candidates.sort(key=lambda grid: grid[0] * grid[1])
    best = (1, 1)
    for candidate in candidates:
        now, before = (abs(width / height - g[0] / g[1]) for g in (candidate, best))
        larger = width * height > 0.5 * size * size * candidate[0] * candidate[1]
        if now < before or (now == before and candidate != best and larger):
            best = candidate
    return best


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_the_layout_follows_the_published_rule(width: int, height: int, most: int) -> None:
    processor = TileProcessor(max_tiles=most)
    assert processor.tiling(width, height) == published_layout(width, height, 1, most, 448)


@pytest.mark.parametrize("max_tiles", [1, 4, 12])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_those_of_transformers(size: tuple[int, int], max_tiles: int) -> None:
    image = picture(*size)
    side = {"height": 64, "width": 64}
    reference: Any = GotOcr2ImageProcessorPil(size=side, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD))
    theirs = reference(
        [image], crop_to_patches=max_tiles > 1, min_patches=1, max_patches=max_tiles, return_tensors="pt"
    )
    pixels, grids, layouts = TileProcessor(tile_size=64, patch_size=16, max_tiles=max_tiles)([image])
    assert pixels.shape == theirs["pixel_values"].shape
    torch.testing.assert_close(pixels, theirs["pixel_values"], atol=1e-6, rtol=0)
    assert grids.tolist() == [[len(pixels), 4, 4]] and [layout.image_size for layout in layouts] == [size]


def test_tiles_are_crops_of_the_stretched_image_and_the_thumbnail_is_last() -> None:
    image = picture(200, 90)
    processor = TileProcessor(tile_size=32, patch_size=4, max_tiles=6)
    assert processor.tiling(200, 90) == (2, 1)
    pixels, _, _ = processor([image])
    stretched = image.resize((64, 32), Image.Resampling.BICUBIC)
    crops = [stretched.crop((x, 0, x + 32, 32)) for x in (0, 32)] + [image.resize((32, 32), Image.Resampling.BICUBIC)]
    mean, std = (np.array(v, dtype=np.float32) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = [(np.asarray(crop, dtype=np.float32) / 255 - mean) / std for crop in crops]
    np.testing.assert_allclose(pixels.numpy(), np.stack(expected).transpose(0, 3, 1, 2), atol=1e-6)


def test_images_of_different_sizes_come_one_after_the_other() -> None:
    processor = TileProcessor(tile_size=32, patch_size=4, max_tiles=4)
    images = [picture(*size, seed=i) for i, size in enumerate([(64, 32), (32, 32), (30, 90)])]
    together, grids, _ = processor(images)
    assert grids[:, 0].tolist() == [3, 1, 4]
    assert torch.equal(together, torch.cat([processor([image])[0] for image in images]))


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"tile_size": 450}, "tile_size"),
        ({"min_tiles": 4, "max_tiles": 2}, "min_tiles"),
        ({"max_tiles": 0}, "max_tiles"),
        ({"image_std": (1.0, 0.0, 1.0)}, "image_std"),
    ],
)
def test_settings_that_make_no_sense(settings_: dict[str, Any], says: str) -> None:
    with pytest.raises(ImageError, match=says):
        TileProcessor(**settings_)


def test_settings_of_both_layouts() -> None:
    published = {"crop_size": 448, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor"}
    assert TileProcessor.from_dict(published, max_tiles=6) == TileProcessor(max_tiles=6)
    for_transformers = {"min_patches": 2, "max_patches": 5, "size": {"height": 224, "width": 224}, "resample": 3}
    assert TileProcessor.from_dict(for_transformers) == TileProcessor(min_tiles=2, max_tiles=5, tile_size=224)
    with pytest.raises(ImageError, match="do_resize"):
        TileProcessor.from_dict({"do_resize": False})
    assert not TileProcessor.from_dict({"use_thumbnail": False}).thumbnail


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"size": {"height": 224, "width": 448}}, "square"),
        ({"size": {"height": "224", "width": "224"}}, "size.*'224'"),
        ({"image_std": [1.0, 0.0, 1.0]}, "image_std"),
        ({"image_mean": [1.0, 2.0]}, "image_mean"),
        ({"image_mean": "abc"}, "image_mean"),
        ({"image_mean": [float("nan"), 0.0, 0.0]}, "image_mean"),
        ({"max_patches": 2.5}, "max_patches"),
        ({"use_thumbnail": "yes"}, "use_thumbnail"),
        ({"image_processor": 3}, "image_processor"),
    ],
)
def test_a_settings_file_that_makes_no_sense(settings_: dict[str, Any], says: str) -> None:
    with pytest.raises(ImageError, match=says):
        TileProcessor.from_dict(settings_)


@pytest.mark.parametrize("max_tiles", [0, -1])
def test_a_bound_on_tiles_is_positive(max_tiles: int) -> None:
    with pytest.raises(ImageError, match="max_tiles"):
        TileProcessor().bounded(None, max_tiles)


# ---------------------------------------------------------------- geometry

GRIDS = st.builds(
    tiled_layout,
    image_size=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    layout=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    thumbnail=st.booleans(),
    patch_size=st.just(4),
    tile_size=st.sampled_from([16, 32]),
    transposed_tokens=st.booleans(),
)


@given(GRIDS)
@settings(max_examples=100, deadline=None)
def test_boxes_of_tokens_tile_the_image_once_for_each_part(grid: ImageLayout) -> None:
    parts = ("tiles", "thumbnail") if grid.thumbnail else ("tiles",)
    for part in parts:
        boxes = grid.boxes[grid.tokens_of(part)]
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        assert np.isclose(areas.sum(), grid.image_size[0] * grid.image_size[1])
        assert len(np.unique(boxes, axis=0)) == len(boxes)
    assert sum(len(grid.tokens_of(part)) for part in parts) == grid.n_tokens


@given(GRIDS, st.data())
@settings(max_examples=100, deadline=None)
def test_a_token_is_found_by_its_box(grid: ImageLayout, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, grid.n_tokens - 1))
    part = "thumbnail" if grid.is_thumbnail(index) else "tiles"
    assert grid.tokens_in_box(tuple(grid.boxes[index]), 0.999, part=part) == [index]
    shares = grid.overlaps(tuple(grid.boxes[index]))
    for whole in ("tiles", "thumbnail")[: 1 + grid.thumbnail]:
        tokens = grid.tokens_of(whole)
        assert np.isclose(shares[tokens].sum(), 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_every_token_of_a_coloured_picture_sees_its_own_colour(transposed: bool) -> None:
    """Each 8 x 8 square has a colour of its own; the pixels a token is made of must be those of its box."""
    cols, rows, side = 3, 2, 4
    processor = TileProcessor(tile_size=32, patch_size=4, max_tiles=6, transposed_tokens=transposed)
    colours = np.arange(cols * side * rows * side).reshape(rows * side, cols * side)
    squares = np.stack([colours * 2, 255 - colours, colours % 7 * 30], axis=-1).astype(np.uint8)
    image = Image.fromarray(squares.repeat(8, axis=0).repeat(8, axis=1))
    grid = processor.layout(image.size)
    assert grid.layout == (3, 2)
    pixels, _, _ = processor([image])
    # tokens as the model makes them: tile by tile, 2 x 2 patches of 4 pixels, row by row
    blocks = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5)
    if transposed:
        blocks = blocks.transpose(1, 2)
    tokens = blocks.flatten(0, 2)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    for i in grid.tokens_of("tiles"):
        x0, y0, x1, y1 = (int(v) for v in grid.boxes[i])
        square = np.asarray(image)[y0:y1, x0:x1].reshape(-1, 3)
        seen = (tokens[i].flatten(1).T * std + mean) * 255
        assert np.abs(square.mean(0) - seen.numpy().mean(0)).max() < 0.5
    values = np.zeros(grid.n_tokens)
    values[[grid.tokens_in_box((0, 8, 8, 16), part="tiles")[0]]] = 1
    assert grid.to_image(values)[0, 1, 0] == 1


def test_a_box_lies_in_tiles_and_in_the_thumbnail() -> None:
    grid = TileProcessor(tile_size=32, patch_size=4, max_tiles=2).layout((64, 32))
    assert grid.n_tokens == 48 and grid.layout == (2, 1)
    assert grid.tokens_in_box((0, 0, 8, 8), part="tiles") == [0]
    assert grid.tokens_in_box((0, 0, 8, 8), part="thumbnail") == [32]
    assert grid.tokens_in_box((0, 0, 8, 8)) == [0, 32]
    assert grid.tile_of(40) == 2 and grid.is_thumbnail(40) and not grid.is_thumbnail(31)
    with pytest.raises(GeometryError, match="token 48"):
        grid.box_of(48)
    with pytest.raises(Exception, match="part"):
        grid.tokens_in_box((0, 0, 8, 8), part="thumb")  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="thumbnail"):
        TileProcessor(tile_size=32, patch_size=4).layout((32, 32)).part("thumbnail")


def test_inputs_of_unknown_image_size_have_no_geometry_of_tiles() -> None:
    from tiny_internvl import CASES, hf_batch

    inputs = tiny_model("qwen2").inputs_from_hf(hf_batch(CASES["images-of-two-sizes"]))
    with pytest.raises(ValueError, match="Hugging Face"):
        inputs.image_grid(0).box_of(0)
    assert inputs.image_grid(1).n_tokens == 16 and inputs.tokens_in_box(1, (0, 0, 8, 8)) == [inputs.image_tokens(1)[0]]
