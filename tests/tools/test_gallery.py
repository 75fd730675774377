"""docs/gallery.md: ten pictures that its own lines make."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tools.gallery import DOCS, blocks, run_cell, small_png


@pytest.fixture(scope="module")
def first_block() -> dict[str, Any]:
    names: dict[str, Any] = {}
    run_cell(blocks()[0][0], names)
    return names


def test_there_are_ten_pictures_of_five_lines_at_most() -> None:
    (_, none), *made = blocks()
    assert none == "" and len(made) == len({picture for _, picture in made}) == 10
    assert all(picture and len(code.splitlines()) <= 5 for code, picture in made)
    files = list((DOCS / "pictures" / "gallery").iterdir())
    assert {f"pictures/gallery/{file.name}" for file in files} == {picture for _, picture in made}
    assert sum(file.stat().st_size for file in files) < 1_500_000


@pytest.mark.parametrize(("code", "picture"), [pytest.param(*block, id=block[1]) for block in blocks()[1:]])
@pytest.mark.repeats_shapes
def test_a_picture_is_what_its_lines_draw(first_block: dict[str, Any], code: str, picture: str) -> None:
    """Its lines need the first block alone. Other versions of matplotlib may place letters a little differently."""
    drawn = Image.open(io.BytesIO(small_png(run_cell(code, dict(first_block)))))
    with Image.open(DOCS / picture) as stored:
        assert np.allclose(stored.size, drawn.size, rtol=0.03)
        pixels = [np.asarray(shown.convert("RGB").resize((400, 300)), float) for shown in (stored, drawn)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 4  # of 255


def test_an_expression_at_the_end_is_the_value() -> None:
    names: dict[str, Any] = {}
    assert run_cell("x = 2\nx + 1", names) == 3 and names["x"] == 2
    assert run_cell("y = x", names) is None and names["y"] == 2
