"""Boxes, tokens and patches agree with counting pixels and with exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_vlm.errors import GeometryError
from hooked_vlm.inputs.layouts import whole_layout

# executed shape annotations look at random entries of tuples, and layouts are made inside of strategies
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

sides = st.integers(1, 3000)
grids = st.builds(
    lambda size, frames, rows, cols, merge: whole_layout(size, (frames, rows * merge, cols * merge), 14, merge),
    size=st.tuples(sides, sides),
    frames=st.integers(1, 3),
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    merge=st.integers(1, 3),
)


@st.composite
def grids_and_boxes(draw, whole_pixels=False):
    """A grid and a box that shares some area with its image (it may stick out)."""
    grid = draw(grids)
    number = st.integers if whole_pixels else st.floats

    def span(length):
        low = draw(number(-5, length - 1))
        return low, draw(number(max(low, 0) + 1, length + 5))

    (x0, x1), (y0, y1) = span(grid.image_size[0]), span(grid.image_size[1])
    return grid, (x0, y0, x1, y1)


# ---- tokens ----


@given(grids, st.data())
def test_index_and_row_col_are_inverse(grid, data):
    index = data.draw(st.integers(0, grid.n_tokens - 1))
    row, col = grid.row_col(index)
    assert grid.index(row, col, index // (grid.rows * grid.cols)) == index


@given(grids, st.data())
def test_the_box_of_a_token_holds_that_token_alone(grid, data):
    index = data.draw(st.integers(0, grid.n_tokens - 1))
    box = grid.box_of(index)
    same_place = [grid.index(*grid.row_col(index), frame) for frame in range(grid.frames)]
    for of in ("box", "token"):
        assert grid.tokens_in_box(box, of=of) == same_place
        assert grid.tokens_in_box(box, 0.999999, of=of) == same_place
        assert grid.overlaps(box, of=of)[index] == pytest.approx(1)


@given(grids)
def test_the_boxes_of_a_frame_tile_the_image(grid):
    width, height = grid.image_size
    boxes = {grid.row_col(i): grid.box_of(i) for i in range(grid.rows * grid.cols)}
    for (row, col), (x0, y0, x1, y1) in boxes.items():
        assert x0 < x1 and y0 < y1
        # edges are shared to the last bit: nothing is left between boxes, nothing covered twice
        assert x0 == (boxes[row, col - 1][2] if col else 0) and y0 == (boxes[row - 1, col][3] if row else 0)
        assert col < grid.cols - 1 or x1 == width
        assert row < grid.rows - 1 or y1 == height
    areas = sum(Fraction(x1) - Fraction(x0) for x0, _, x1, _ in list(boxes.values())[: grid.cols])
    assert areas == width
    exact = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (map(Fraction, b) for b in boxes.values())]
    assert sum(exact) == width * height


@given(grids)
def test_every_frame_has_the_same_boxes(grid):
    per_frame = grid.rows * grid.cols
    assert grid.n_tokens == grid.frames * per_frame
    assert grid.box_of(grid.n_tokens - 1) == grid.box_of(per_frame - 1)


# ---- boxes ----


@given(grids_and_boxes())
def test_overlaps_equal_exact_fractions(case):
    grid, box = case
    x0, y0, x1, y1 = (Fraction(v) for v in box)
    width, height = grid.image_size
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    of_box, of_token = grid.overlaps(box), grid.overlaps(box, of="token")
    for i in range(grid.n_tokens):
        row, col = grid.row_col(i)
        left, right = Fraction(col * width, grid.cols), Fraction((col + 1) * width, grid.cols)
        top, bottom = Fraction(row * height, grid.rows), Fraction((row + 1) * height, grid.rows)
        common = max(min(right, x1) - max(left, x0), 0) * max(min(bottom, y1) - max(top, y0), 0)
        assert of_box[i] == pytest.approx(float(common / ((x1 - x0) * (y1 - y0))), abs=1e-9)
        assert of_token[i] == pytest.approx(float(common / ((right - left) * (bottom - top))), abs=1e-9)
    assert of_box.sum() == pytest.approx(grid.frames)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 8), st.integers(1, 8), st.data())
def test_tokens_in_box_equal_counting_pixels(rows, cols, token_height, token_width, data):
    grid = whole_layout((cols * token_width, rows * token_height), (1, 2 * rows, 2 * cols))
    owner = np.arange(rows * cols).reshape(rows, cols).repeat(token_height, 0).repeat(token_width, 1)
    height, width = owner.shape
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    pixels = owner[y0:y1, x0:x1]
    counts = np.bincount(pixels.ravel(), minlength=rows * cols)

    box = (x0, y0, x1, y1)
    assert grid.tokens_in_box(box) == np.flatnonzero(counts).tolist()
    np.testing.assert_allclose(grid.overlaps(box), counts / pixels.size)
    np.testing.assert_allclose(grid.overlaps(box, of="token"), counts / (token_height * token_width))
    for threshold in (0.1003, 0.4997):  # no ratio of these areas, so that rounding does not decide
        assert grid.tokens_in_box(box, threshold) == np.flatnonzero(counts / pixels.size > threshold).tolist()


def test_the_threshold_is_strict():
    grid = whole_layout((56, 28), (1, 2, 4))
    assert grid.tokens_in_box((14, 0, 42, 28), 0.5) == []
    assert grid.tokens_in_box((14, 0, 42, 28), 0.49) == [0, 1]


def test_what_sticks_out_of_the_image_is_cut_off():
    grid = whole_layout((100, 60), (1, 4, 4))
    np.testing.assert_array_equal(grid.overlaps((-40, -10, 50, 30)), grid.overlaps((0, 0, 50, 30)))
    assert grid.tokens_in_box((75, 45, 1e9, 1e9), 0.9) == [3]


def test_a_box_covers_all_frames_of_a_video():
    grid = whole_layout((56, 56), (3, 4, 4))
    assert grid.tokens_in_box((30, 5, 40, 10)) == [1, 5, 9]


# ---- the published code of the OCR-heads paper ----


def published_tile_weights(grid, box):
    """`return_weights` and `compute_tile_weights` of that repository, literally but for the factor 100."""
    space = grid.resized_size
    x_scale, y_scale = space.width / grid.image_size[0], space.height / grid.image_size[1]
    x0, y0, x1, y1 = (
        int(box[0] * x_scale),
        int(box[1] * y_scale),
        int(box[2] * x_scale),
        int(box[3] * y_scale),
    )
    area, side = (x1 - x0) * (y1 - y0), space.width // grid.cols
    weights = []
    for row in range(space.height // side):
        for col in range(space.width // side):
            left, top = col * side, row * side
            inter_width = max(0, min(left + side, x1) - max(left, x0))
            inter_height = max(0, min(top + side, y1) - max(top, y0))
            weights.append(inter_width * inter_height / area if area else 0)
    return weights * grid.frames


@given(grids_and_boxes(whole_pixels=True))
def test_truncated_overlaps_are_those_of_the_published_code(case):
    grid, box = case
    np.testing.assert_allclose(grid.overlaps(box, truncate=True), published_tile_weights(grid, box), atol=1e-12)


def test_the_papers_figure():
    """Two digits of its example page (23 tokens wide): each lies in two rows, 55% above and 45% below.

    The figure's other digits have four parts (12, 48, 9 and 31%) that no rectangle has: of such, the products
    of opposite parts are equal, and rounding to whole percents does not account for the difference.
    """
    grid = whole_layout((23 * 28, 11 * 28), (1, 22, 46))
    top = 5 * 28 - 11
    four, five = (5 * 28 + 4, top, 5 * 28 + 20, top + 20), (6 * 28 + 6, top, 6 * 28 + 22, top + 20)
    for box, tokens in ((four, [97, 120]), (five, [98, 121])):
        assert grid.tokens_in_box(box, 0.1, truncate=True) == tokens
        assert grid.overlaps(box, truncate=True)[tokens].tolist() == pytest.approx([0.55, 0.45])


def test_a_box_that_truncation_empties_overlaps_nothing():
    grid = whole_layout((2800, 2800), (1, 4, 4))
    box = (1001, 1001, 1009, 1015)
    assert grid.tokens_in_box(box) == [0]
    assert grid.tokens_in_box(box, truncate=True) == []


# ---- patches and pictures ----


@given(grids)
def test_patch_order_is_a_permutation_whose_blocks_are_the_tokens(grid):
    order, merge = grid.patch_order(), grid.patches.rows // grid.rows
    assert len({tuple(place) for place in order.tolist()}) == grid.n_patches == len(order)
    frame, row, col = (order // [1, merge, merge]).T
    tokens = [grid.index(*place) for place in zip(row.tolist(), col.tolist(), frame.tolist(), strict=True)]
    assert tokens == np.arange(grid.n_tokens).repeat(merge**2).tolist()


def test_patch_order_by_hand():
    assert whole_layout((56, 28), (1, 2, 4)).patch_order().tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 2], [0, 0, 3], [0, 1, 2], [0, 1, 3],
    ]  # fmt: skip


@given(grids)
def test_to_image_puts_each_value_at_its_token(grid):
    picture = grid.to_image(np.arange(grid.n_tokens))
    assert picture.shape == (grid.frames, grid.rows, grid.cols)
    for i in range(grid.n_tokens):
        row, col = grid.row_col(i)
        assert picture[i // (grid.rows * grid.cols), row, col] == i


def test_to_image_takes_tensors_and_leading_axes():
    grid = whole_layout((56, 56), (2, 4, 4))
    values = torch.arange(24.0, dtype=torch.bfloat16, requires_grad=True).reshape(3, 8)
    picture = grid.to_image(values)
    assert picture.shape == (3, 2, 2, 2) and picture.dtype == np.float32
    assert picture[1, 1, 0, 1] == 8 + 5


# ---- refusals ----


@pytest.mark.parametrize(
    ("box", "says"),
    [
        ((10, 10, 10, 20), "area"),
        ((20, 10, 10, 20), "area"),
        ((0, 0, float("nan"), 5), "finite"),
        ((0, 0, float("inf"), 5), "finite"),
        ((100, 0, 120, 50), "outside.*100 x 50"),
        ((-20, 0, 0, 50), "outside"),
        ((0, 50, 100, 51), "outside"),
        ((0, 0, 10), r"\(0, 0, 10\)"),
    ],
)
def test_a_bad_box_is_refused(box, says):
    grid = whole_layout((100, 50), (1, 4, 8))
    for truncate in (False, True):
        with pytest.raises(GeometryError, match=says):
            grid.tokens_in_box(box, truncate=truncate)


@pytest.mark.parametrize("min_overlap", [-0.1, 1, 10, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(min_overlap):
    with pytest.raises(GeometryError, match="min_overlap"):
        whole_layout((100, 50), (1, 4, 8)).tokens_in_box((0, 0, 5, 5), min_overlap)


def test_tokens_that_do_not_exist_are_refused():
    grid = whole_layout((100, 50), (1, 4, 8))
    for index in (-1, 8):
        with pytest.raises(GeometryError, match="8 tokens"):
            grid.box_of(index)
    for place in ((2, 0), (0, 4), (-1, 0), (0, 0, 1)):
        with pytest.raises(GeometryError, match=r"2 rows.*4 columns"):
            grid.index(*place)
    with pytest.raises(GeometryError, match="8 tokens"):
        grid.to_image(np.zeros(7))


def test_a_grid_that_cannot_be_merged_is_refused():
    with pytest.raises(GeometryError, match=r"\(1, 4, 7\)"):
        whole_layout((100, 50), (1, 4, 7))
    with pytest.raises(GeometryError, match=r"\(0, 50\)"):
        whole_layout((0, 50), (1, 4, 8))
