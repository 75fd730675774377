"""What corresponds to what between clean and corrupt inputs, where regions lie, and what corrupt pictures look like."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pairs import inputs_of, last_logits, model_and_pair
from PIL import Image
from torch import Tensor

from hooked_vlm import GeometryError, HookedVLM, InputError
from hooked_vlm.inputs.layouts import tiled_layout, whole_layout
from hooked_vlm.inputs.pan_and_scan import PanScanProcessor
from hooked_vlm.metrics import logit
from hooked_vlm.patching import Pair, Region, masked, noised, patch, swapped
from hooked_vlm.patching.pairs import by_place
from hooked_vlm.patching.places import n_patches, patches_in_box, patches_on_image, positions_at

TOYS = ("toy-qwen2-vl", "toy-internvl2")


@pytest.fixture(scope="module", params=TOYS)
def model(request: pytest.FixtureRequest) -> Any:
    return HookedVLM.from_pretrained(request.param)


# ---- alignment ----


@pytest.mark.parametrize(
    ("corrupt", "says"),
    [
        ([[5, 6, "small", 7, 8, 9]], r"1 x 12\b.*2 x 2\D+3\b.*1 x 11\b"),
        ([[5, 6, "large", 7, 8, 9, 10]], r"2 x 2\D+3\b.*1 x 14\b.*2 x 3\D+3\b"),
        ([[5, "small", 6, 7, 8, 9, 10]], r"2 x 2\D+3\b.*2 x 2\D+2\b"),
        ([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]], "no image"),
    ],
    ids=["shorter prompt", "larger image", "image elsewhere", "no image"],
)
def test_inputs_with_other_columns_are_refused_with_both_shapes_and_a_way_out(corrupt: Any, says: str) -> None:
    clean = inputs_of("qwen2-vl", [[5, 6, "small", 7, 8, 9, 10]], 1)
    with pytest.raises(InputError, match=says) as refused:
        Pair(clean, inputs_of("qwen2-vl", corrupt, 2))
    assert "with_image" in str(refused.value) and 'by="groups"' in str(refused.value)


def test_an_answer_does_not_correspond_to_a_part_of_a_prompt() -> None:
    """In PaliGemma the one is causal, the other seen by the whole prompt."""
    clean = inputs_of("paligemma2", [["small", 6, 7]], 1).append([8, 9])
    with pytest.raises(InputError, match=r"2 of them appended.*20 tokens \("):
        Pair(clean, replace(clean, n_generated=(0,)))


def test_other_refusals() -> None:
    clean = inputs_of("qwen2-vl", [[5, "small", 7]], 1)
    with pytest.raises(InputError, match=r"clean.*1 rows.*corrupt.*2"):
        Pair(clean, inputs_of("qwen2-vl", [[5, "small", 7], [5, "small", 7]], 2))
    with pytest.raises(InputError, match="'image'"):
        Pair(clean, clean, {"image": (1,)})
    with pytest.raises(InputError, match=r"1 images.*0"):
        Pair(clean, inputs_of("qwen2-vl", [[5, 7]], 2), by="groups")


def test_another_grid_corresponds_by_place_and_text_by_groups() -> None:
    """A picture of 2 x 2 tokens and one of 2 x 3."""
    clean = inputs_of("qwen2-vl", [[5, 6, "small", 7, 8, 9, 10]], 1)
    corrupt = inputs_of("qwen2-vl", [[5, 6, "large", 7, 8, 9, 10]], 2)
    pair = Pair(clean, corrupt, {"corner": (3,)}, by="groups")
    assert pair.matches("noising")[0].tolist() == [0, 1, 2, 3, 5, 6, 8, *range(9, 14)]
    assert pair.matches("denoising")[0].tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 6, *range(7, 12)]
    # the region of the clean picture, as the larger corrupt one has it
    found = [positions_at(pair, "corner", d, pair.matches(d)) for d in ("noising", "denoising")]
    assert found == [((3,),), ((3,),)]
    assert positions_at(replace(pair, places={"c": (4,)}), "c", "denoising", pair.matches("denoising")) == ((4, 5),)


def test_patches_between_grids_equal_a_copy_by_hand() -> None:
    model, _ = model_and_pair("qwen2-vl")
    clean = inputs_of("qwen2-vl", [[5, 6, "small", 7, 8, 9, 10]], 1)
    corrupt = inputs_of("qwen2-vl", [[5, 6, "large", 7, 8, 9, 10]], 2)
    pair = Pair(clean, corrupt, by="groups")
    result = patch(model, pair, "resid_post", logit(5), where=("image", "final", "question"), layers=(1,))
    copies = {
        "image": ([3, 4, 5, 6, 7, 8], [3, 4, 4, 5, 6, 6]),
        "final": ([13], [11]),
        "question": ([10, 11, 12, 13], [8, 9, 10, 11]),
    }
    for place, (to, of) in copies.items():
        with torch.no_grad():
            _, cache = model.run_with_cache(clean)

            def put(x: Tensor, hook: Any, to=to, of=of, source=cache["resid_post", 1]) -> Tensor:
                x = x.clone()
                x[0, to] = source[0, of]
                return x

            logits = model.run_with_hooks(corrupt, fwd_hooks=[("blocks.1.hook_resid_post", put)])
        expected = last_logits(logits, corrupt)[:, 5]
        np.testing.assert_allclose(result.select(place=place).values.reshape(-1), expected, atol=2e-5)
    with pytest.raises(InputError, match='by="columns"'):
        patch(model, pair, "pattern", logit(5), where="final")
    with pytest.raises(InputError, match=r"\(1, 4, 4\).*\(1, 4, 6\)"):
        patch(model, pair, "resid_pre", logit(5), where="image", tower="vision")


def test_groups_of_another_length_are_refused_and_the_others_are_not(model: Any) -> None:
    picture = Image.new("RGB", (128, 112), "white")
    clean, corrupt = (
        model.to_inputs(text, images=picture) for text in ("What is this?", "What is in the image, then?")
    )
    pair = Pair(clean, corrupt, by="groups")
    for place in ("image", "assistant_header", "final"):
        (found,) = positions_at(pair, place, "denoising", pair.matches("denoising"))
        assert list(found) == vars(corrupt.positions)[place][0].tolist()
        other = pair.matches("denoising")[0, list(found)]
        assert other.tolist() == vars(clean.positions)[place][0].tolist()
    n = [len(x.positions.question[0]) for x in (corrupt, clean)]
    with pytest.raises(InputError, match=rf"question.*\b{n[0]}\b.*\b{n[1]}\b"):
        positions_at(pair, "question", "denoising", pair.matches("denoising"))


def test_tiles_correspond_by_place_and_thumbnails_to_thumbnails() -> None:
    two = tiled_layout((64, 32), (2, 1), True, patch_size=4, merge_size=2, tile_size=32)
    one = tiled_layout((64, 32), (1, 1), False, patch_size=4, merge_size=2, tile_size=32)
    for base, source in ((two, one), (one, two), (two, two)):
        found = by_place(base, source)
        for token, other in enumerate(found):
            (x0, y0, x1, y1), (a, b, c, d) = base.boxes[token], source.boxes[other]
            assert a <= (x0 + x1) / 2 < c and b <= (y0 + y1) / 2 < d
            if source.thumbnail:
                assert source.is_thumbnail(int(other)) == base.is_thumbnail(token)
    flat, tall = whole_layout((60, 60), (1, 4, 8)), whole_layout((60, 60), (1, 8, 4))
    assert by_place(flat, tall).tolist() == [2, 2, 3, 3, 6, 6, 7, 7]  # centres in the 2nd and 4th of four rows


def test_crops_correspond_by_place_in_the_picture() -> None:
    """Of a wide picture three crops, of a less wide one two: the second crop lies elsewhere, the third is nowhere."""
    processor = PanScanProcessor(pan_and_scan=True, min_crop_size=8, side=32, patch_size=4, token_size=2)
    base, source = (processor.layout(size) for size in ((96, 32), (64, 32)))
    assert [part.name for part in base.parts] == ["tiles", "crop 0", "crop 1", "crop 2"]
    assert [part.name for part in source.parts] == ["tiles", "crop 0", "crop 1"]
    found = by_place(base, source)
    assert (found[base.part("crop 0").cells] >= 0).all() and (found[base.part("crop 1").cells] < 0).any()
    for token in range(base.n_tokens):
        (x0, y0, x1, y1) = base.boxes[token]
        x, y = (x0 + x1) / 2 / 96, (y0 + y1) / 2 / 32
        name: Any = base.part_of(token) if base.part_of(token) in ("tiles", "crop 0", "crop 1") else "tiles"
        other = [int(t) for t in source.tokens_of(name) if within(source.boxes[int(t)], x * 64, y * 32)]
        assert found[token] == (other[0] if other else -1)


def within(box: Any, x: float, y: float) -> bool:
    return box[0] <= x < box[2] and box[1] <= y < box[3]


def test_as_many_tiles_that_lie_otherwise_are_no_same_columns() -> None:
    """Two tiles side by side and two below each other: the same number of tokens, of other places of the picture."""
    model = HookedVLM.from_pretrained("toy-internvl2")
    wide = model.to_inputs("Read the text.", images=Image.new("RGB", (256, 128), "white"))
    tall = wide.with_image(0, Image.new("RGB", (128, 256), "white"))
    assert wide.shape == tall.shape and wide.grids == tall.grids
    with pytest.raises(InputError, match=r"2 x 1 tiles.*1 x 2 tiles"):
        Pair(wide, tall)
    pair = Pair(wide, tall, by="groups")
    matches = pair.matches("denoising")[0]
    grids = tall.image_grid(0), wide.image_grid(0)
    start = int(tall.image_tokens(0)[0])
    for token in range(grids[0].n_tokens):
        (x0, y0, x1, y1), (a, b, c, d) = grids[0].boxes[token], grids[1].boxes[matches[start + token] - start]
        assert a <= (x0 + x1) < c and b <= (y0 + y1) / 4 < d  # twice as wide, half as high
    with pytest.raises(InputError, match=r"\(3, 16, 16\).*\(3, 16, 16\)"):
        patch(model, pair, "resid_pre", logit(5), where="image", tower="vision")
    assert Pair(wide, wide.with_image(0, Image.new("RGB", (512, 256), "white"))).by == "columns"


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ((3, 99), "99.*row 0"),
        ((-1,), "-1.*row 0"),
        ((), "Region"),
        ((Region((0, 0, 5, 5)), 3), "Region"),
        ((Region((0, 0, 5, 5), image=1),), "image 1"),
    ],
)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_places_that_are_nowhere_are_refused(place: Any, says: str, direction: Any) -> None:
    inputs = inputs_of("qwen2-vl", [[5, "small", 7]], 1)
    with pytest.raises(InputError, match=says):
        pair = Pair(inputs, inputs, {"x": place})
        positions_at(pair, "x", direction, pair.matches(direction))


# ---- places ----


def test_a_region_is_the_tokens_under_its_box(model: Any) -> None:
    inputs = model.to_inputs("Read the text.", images=Image.new("RGB", (128, 128), "white"))
    pair = Pair(inputs, inputs, {"corner": Region((0, 0, 20, 10)), "two": (5, 7)})
    matches = pair.matches("denoising")
    assert positions_at(pair, "corner", "denoising", matches) == (tuple(inputs.tokens_in_box(0, (0, 0, 20, 10))),)
    assert positions_at(pair, "two", "denoising", matches) == ((5, 7),)
    assert positions_at(pair, "corner", "denoising", matches)[0] == (
        inputs.image_tokens(0)[0],
        inputs.image_tokens(0)[1],
    )


@pytest.mark.parametrize("box", [(0, 0, 8, 8), (37, 50, 70, 61), (120, 100, 128, 128)])
def test_patches_under_a_box_are_those_whose_embedding_the_box_changes(model: Any, box: Any) -> None:
    """Pictures whose size needs no resizing, two of them in one prompt."""
    size = (256, 128) if "internvl" in model.cfg.model_name else (128, 128)
    blank = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    painted = np.array(blank)
    painted[box[1] : box[3], box[0] : box[2]] ^= 255
    inputs = model.to_inputs("Read the text.", images=[blank, blank])
    other = inputs.with_image(1, Image.fromarray(painted))
    embedded = [
        model.run_with_cache(x, names_filter="vision.hook_embed")[1]["vision.hook_embed"] for x in (inputs, other)
    ]
    changed = ((embedded[0] - embedded[1]).abs().amax(-1) > 1e-6).nonzero().tolist()
    part = "tiles" if "internvl" in model.cfg.model_name else "all"
    n = n_patches(inputs)
    if part == "tiles":
        assert len(n) == 6  # of each picture two tiles and a thumbnail
        changed = [c for c in changed if c[0] != 5]
    found = patches_in_box(inputs, Region(box, image=1, part=part))
    assert sorted(map(list, found)) == changed
    # and the same patches, as pictures number them
    for which in ("tiles", "thumbnail") if part == "tiles" else ("tiles",):
        numbers = patches_on_image(inputs, 1, which)
        rows, cols = np.indices(numbers.shape)
        x, y = (cols + 0.5) * size[0] / numbers.shape[1], (rows + 0.5) * size[1] / numbers.shape[0]
        for (r, c), number in np.ndenumerate(numbers):
            point = (x[r, c], y[r, c], x[r, c] + 0.01, y[r, c] + 0.01)
            (own,) = patches_in_box(inputs, Region(point, image=1, part=which if part == "tiles" else "all"))
            assert own == divmod(int(number), max(n))


# ---- corrupt pictures ----


def gradient() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 255, (10, 12, 3), dtype=np.uint8)


def test_a_masked_region_has_one_colour_and_the_rest_is_as_it_was() -> None:
    pixels = gradient()
    found = np.array(masked(pixels, (3, 2, 6, 5), fill=(1, 2, 3)))
    expected = pixels.copy()
    expected[2:5, 3:6] = (1, 2, 3)
    assert (found == expected).all()
    around = [pixels[y, x] for y in range(1, 6) for x in range(2, 7) if not (2 <= y < 5 and 3 <= x < 6)]
    assert (np.array(masked(pixels, (3, 2, 6, 5)))[3, 4] == np.rint(np.mean(around, 0))).all()
    assert (np.array(masked(pixels, (-5, -5, 50, 50), fill=(9, 9, 9))) == 9).all()
    # a pixel belongs to a box that holds its upper left corner
    assert (np.array(masked(pixels, (2.5, 1.2, 6, 5), fill=(1, 2, 3))) == expected).all()


def test_swapped_regions_are_in_each_others_place() -> None:
    pixels = gradient()
    found = np.array(swapped(pixels, (0, 0, 3, 2), (5, 6, 8, 8)))
    expected = pixels.copy()
    expected[0:2, 0:3], expected[6:8, 5:8] = pixels[6:8, 5:8], pixels[0:2, 0:3]
    assert (found == expected).all()
    with pytest.raises(GeometryError, match=r"3 x 2.*3 x 3"):
        swapped(pixels, (0, 0, 3, 2), (5, 6, 8, 9))
    with pytest.raises(GeometryError, match="overlap"):
        swapped(pixels, (0, 0, 3, 2), (2, 1, 5, 3))


def test_noise_is_seeded_and_stays_in_its_box() -> None:
    pixels = np.full((40, 50, 3), 128, dtype=np.uint8)
    found = np.array(noised(pixels, 20, seed=3, box=(10, 10, 40, 30)))
    changed = (found != pixels).any(-1)
    inside = np.zeros_like(changed)
    inside[10:30, 10:40] = True
    assert not changed[~inside].any() and changed[inside].mean() > 0.95
    assert abs(found[inside].astype(float).std() - 20) < 2
    assert (found == np.array(noised(pixels, 20, seed=3, box=(10, 10, 40, 30)))).all()
    assert (np.array(noised(pixels, 20, seed=4)) != np.array(noised(pixels, 20, seed=3))).any()
    with pytest.raises(GeometryError, match="-1"):
        noised(pixels, -1, 0)


@pytest.mark.parametrize("box", [(12, 0, 14, 3), (3, 3, 3, 5), (5, 5, 2, 8)])
def test_a_box_without_pixels_is_refused(box: Any) -> None:
    with pytest.raises(GeometryError, match="12 x 10"):
        masked(gradient(), box)
