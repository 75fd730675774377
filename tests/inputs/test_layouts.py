"""Random layouts, of families that exist and of others: every question about a place agrees with a table of pixels."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm.errors import GeometryError
from hooked_vlm.inputs.boxes import ImageSize, LayoutPart
from hooked_vlm.inputs.geometry import ImageLayout

# executed shape annotations look at random entries of tuples, and layouts are made inside of strategies
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


@st.composite
def spans(draw: Any, most: int) -> np.ndarray:
    """Where cells begin and end: side by side, with gaps, or overlapping."""
    n, kind = draw(st.integers(1, 4)), draw(st.sampled_from(["even", "gaps", "overlap"]))
    width = most // n
    starts = np.arange(n) * width
    wide = {"even": width, "gaps": max(1, width - 1), "overlap": width + 1}[kind]
    return np.stack((starts, np.minimum(starts + wide, most)), axis=1)


@st.composite
def layouts(draw: Any) -> ImageLayout:
    """A picture of parts that are cropped or padded, with tokens of no place strewn in between."""
    size = ImageSize(draw(st.integers(4, 60)), draw(st.integers(4, 60)))
    parts: list[Any] = []
    n = 0
    names = draw(st.sampled_from([("tiles",), ("tiles", "thumbnail"), ("thumbnail", "tiles"), ("tiles", "crop 1")]))
    for name in names:
        seen = ImageSize(draw(st.integers(4, 24)), draw(st.integers(4, 24)))
        x0, y0 = draw(st.integers(-5, 2)), draw(st.integers(-5, 2))
        area = (x0, y0, draw(st.integers(x0 + 4, 70)), draw(st.integers(y0 + 4, 70)))
        columns, rows = draw(spans(seen.width)), draw(spans(seen.height))
        newline = draw(st.booleans())  # a token behind each row
        count = len(rows) * (len(columns) + newline)
        cells = np.arange(n, n + count).reshape(1, len(rows), -1)[:, :, : len(columns)]
        parts.append(LayoutPart(name, cells, area, seen, columns, rows))
        n += count
    n += draw(st.integers(0, 3))
    cut = draw(st.integers(1, n - 1)) if n > 1 and draw(st.booleans()) else 0
    runs = (cut, n - cut) if cut else (n,)
    between = ("<a>", "<b>", "")[: len(runs) + 1] if len(runs) > 1 else ()
    return ImageLayout(size, tuple(parts), n, (1, 1, n), np.zeros(n, int), np.arange(n)[None], None, runs, between)


def box_by_hand(layout: ImageLayout, token: int) -> list[float] | None:
    for part in layout.parts:
        for _, row, col in np.argwhere(part.cells == token):
            x0, y0, x1, y1 = part.area
            xs = [x0 + x / part.seen.width * (x1 - x0) for x in part.columns[col]]
            ys = [y0 + y / part.seen.height * (y1 - y0) for y in part.rows[row]]
            return [xs[0], ys[0], xs[1], ys[1]]
    return None


@given(layouts())
@settings(max_examples=200, deadline=None)
def test_every_token_has_the_box_of_its_cell_or_none(layout: ImageLayout) -> None:
    for token in range(layout.n_tokens):
        expected = box_by_hand(layout, token)
        found = layout.box_of(token)
        if expected is None:
            assert found is None and layout.part_of(token) is None and np.isnan(layout.boxes[token]).all()
        else:
            assert found == pytest.approx(expected) and layout.boxes[token] == pytest.approx(expected)
            assert token in layout.tokens_of(str(layout.part_of(token)))
    assert set(layout.tokens_of("all")) == {t for t in range(layout.n_tokens) if layout.part_of(t) is not None}


@given(layouts(), st.data())
@settings(max_examples=200, deadline=None)
def test_shares_of_a_box_are_areas(layout: ImageLayout, data: st.DataObject) -> None:
    """Of what of a box lies in the picture: nothing that was cropped counts for any token, and padding is nothing."""
    (width, height) = layout.image_size
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (x0, y0, data.draw(st.integers(x0 + 1, width + 3)), data.draw(st.integers(y0 + 1, height + 3)))
    clipped = (x0, y0, min(box[2], width), min(box[3], height))
    area = (clipped[2] - x0) * (clipped[3] - y0)
    expected = np.zeros(layout.n_tokens)
    for token in range(layout.n_tokens):
        own = box_by_hand(layout, token)
        if own is not None:
            across = max(0, min(own[2], clipped[2]) - max(own[0], clipped[0]))
            expected[token] = across * max(0, min(own[3], clipped[3]) - max(own[1], clipped[1])) / area
    if not expected.any():
        with pytest.raises(GeometryError, match="does not see"):
            layout.overlaps(box)
        return
    np.testing.assert_allclose(layout.overlaps(box), expected, atol=1e-12)
    for part in ("all", *(part.name for part in layout.parts)):
        tokens = layout.tokens_of(part)
        assert layout.tokens_in_box(box, 0.1003, part=part) == [t for t in tokens if expected[t] > 0.1003]


@given(layouts(), st.integers(1, 90), st.integers(1, 90))
@settings(max_examples=100, deadline=None)
def test_a_layout_in_another_size_has_boxes_of_that_size(layout: ImageLayout, width: int, height: int) -> None:
    scale = np.array([width / layout.image_size[0], height / layout.image_size[1]] * 2)
    scaled = layout.scaled_to((width, height))
    np.testing.assert_allclose(scaled.boxes, layout.boxes * scale)
    assert scaled.same_as(layout) and scaled.image_size == (width, height)


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_values_are_laid_out_by_cells(layout: ImageLayout) -> None:
    for part in layout.parts:
        assert (layout.to_image(np.arange(layout.n_tokens), part.name) == part.cells).all()
    with pytest.raises(GeometryError, match=r'"all" or one of .tiles|"all" or one of .thumb'):
        layout.to_image(np.arange(layout.n_tokens), "left")


def test_a_layout_that_contradicts_itself_is_refused() -> None:
    cells = np.array([[[0, 1]]])
    part = LayoutPart("tiles", cells, (0, 0, 4, 4), ImageSize(4, 4), np.array([[0, 2], [2, 4]]), np.array([[0, 4]]))
    rest = (2, (1, 1, 2), np.zeros(2, int), np.arange(2)[None])
    ImageLayout(ImageSize(4, 4), (part,), *rest)
    twice = LayoutPart("thumbnail", cells, part.area, part.seen, part.columns, part.rows)
    with pytest.raises(GeometryError, match="different numbers"):
        ImageLayout(ImageSize(4, 4), (part, twice), *rest)
    with pytest.raises(GeometryError, match="2 tokens"):
        ImageLayout(ImageSize(4, 4), (part,), *rest, None, (1, 2))
    with pytest.raises(GeometryError, match="2 runs need 3 texts"):
        ImageLayout(ImageSize(4, 4), (part,), *rest, None, (1, 1), ("a", "b"))
