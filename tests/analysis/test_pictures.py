"""Figures show the numbers that they are given, and a notebook shows the figures."""

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hooked_vlm import InputError
from hooked_vlm.analysis.pictures import heatmap, overlay

PAGE = Image.new("RGB", (40, 30), "white")


def drawn(figure: Any) -> list[np.ndarray]:
    """The maps over the picture of each panel."""
    return [np.asarray(axes.images[-1].get_array()) for axes in figure.axes[:-1]]  # the last is the scale


def test_one_map_or_many_as_tensors_arrays_or_a_sequence() -> None:
    maps = torch.rand(3, 2, 4)
    for given in (maps, maps.numpy(), list(maps), [maps[0].numpy(), maps[1], maps[2]]):
        figure = overlay(PAGE, given)
        np.testing.assert_array_equal(drawn(figure), maps.numpy())
        assert [axes.get_title() for axes in figure.axes[:-1]] == ["0", "1", "2"]
    figure = overlay(np.asarray(PAGE), maps[1])
    np.testing.assert_array_equal(drawn(figure), maps[1:2].numpy())
    assert figure.axes[0].get_title() == ""
    halves = overlay(PAGE, maps.bfloat16().requires_grad_())
    np.testing.assert_array_equal(drawn(halves), maps.bfloat16().float().numpy())


def test_maps_that_do_not_fit_are_refused() -> None:
    for panels, words in (([], "none"), ([np.zeros((2, 2)), np.zeros((2, 3))], r"\(2, 2\) and \(2, 3\)")):
        with pytest.raises(InputError, match=words):
            overlay(PAGE, panels)
    with pytest.raises(InputError, match="a title for each of 1 maps, got 2"):
        overlay(PAGE, np.zeros((2, 2)), ["a", "b"])


def test_a_figure_is_its_own_picture_in_a_notebook() -> None:
    """A kernel asks for `_repr_png_`; matplotlib's figures have it only once pyplot set up the inline backend."""
    for figure in (overlay(PAGE, np.eye(2)), heatmap(np.eye(2), "ab", "cd", ("row", "column"), "value")):
        with Image.open(io.BytesIO(figure._repr_png_())) as picture:
            assert picture.format == "PNG" and picture.width > 200


def test_drawing_needs_no_pyplot() -> None:
    """pyplot keeps figures until they are closed, and may want a display."""
    code = (
        "import sys, numpy; from hooked_vlm.analysis import heatmap; heatmap(numpy.eye(2), 'ab', 'cd', ('r', 'c'), 'v')"
    )
    code += "; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
