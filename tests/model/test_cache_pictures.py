"""`cache.show` draws what the pattern says, over the picture, in every family."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import model_and_inputs

from hooked_vlm import HookedVLM, InputError
from hooked_vlm.toys.pages import make_page


def drawn(figure: Any) -> list[np.ndarray]:
    """The map of each panel; NaN where the image has no token."""
    return [np.ma.filled(np.ma.asarray(axes.images[-1].get_array(), float), np.nan) for axes in figure.axes[:-1]]


@torch.no_grad()
def test_every_family_shows_the_attention_to_its_image(family: str) -> None:
    """The colours of a map are the pattern's values on the image tokens that lie in the picture."""
    model, inputs = model_and_inputs(family, "padded")
    _, cache = model.run_with_cache(inputs)
    image = inputs.n_images - 1
    row, tokens = inputs.row_of_image(image), inputs.image_tokens(image)
    figure = cache.show(1, image=image, picture=np.zeros((30, 40, 3), np.uint8))
    maps = drawn(figure)
    assert len(maps) == model.cfg.n_heads
    pattern = cache["pattern", 1][row, :, inputs.stop[row] - 1]
    shown = inputs.on_image(image, np.arange(len(tokens)))  # the number of the token in each cell
    for head, found in enumerate(maps):
        expected = [[pattern[head, tokens[int(n)]] if n >= 0 else np.nan for n in line] for line in shown]
        np.testing.assert_allclose(found, expected, atol=1e-7)
        assert figure.axes[head].get_title() == f"head 1.{head}"


def test_a_head_and_a_token_are_chosen() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    page = make_page(np.random.default_rng(7), n_lines=4)
    inputs = model.to_inputs(page.question(2), images=page.image)
    _, cache = model.run_with_cache(inputs)
    at = int(inputs.positions.question[0][-2])
    for token in (at, at - inputs.shape[1]):
        (found,) = drawn(figure := cache.show(-2, 1, token=token, picture=page.image))
        pattern = cache["pattern", 2][0, 1, at, inputs.image_tokens(0)]
        np.testing.assert_allclose(found, pattern.reshape(7, 8), atol=1e-7)
        assert figure.axes[0].get_title() == "head 2.1"
        assert figure.get_suptitle() == f"attention of 'u', position {at}"


def test_without_the_original_the_pixels_of_the_model_are_behind_the_map() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    page = make_page(np.random.default_rng(7), n_lines=4)
    _, cache = model.run_with_cache(model.to_inputs(page.question(2), images=page.image))
    own, given = (cache.show(2, 1, picture=p).axes[0].images[0].get_array() for p in (None, page.image))
    np.testing.assert_allclose(np.asarray(own, int), np.asarray(given, int), atol=1)


def test_what_cannot_be_shown_says_what_to_do() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    page = make_page(np.random.default_rng(7), n_lines=4)
    inputs = model.to_inputs(page.question(2), images=page.image)
    _, cache = model.run_with_cache(model.to_inputs("hello"))
    with pytest.raises(InputError, match=r"no image.*cache\[\"pattern\", layer\]"):
        cache.show(2, 1)
    _, cache = model.run_with_cache(inputs, names_filter="blocks.1.hook_resid_post")
    with pytest.raises(KeyError, match="names_filter"):
        cache.show(2, 1)
    _, cache = model.run_with_cache(inputs)
    for arguments, words in (({"head": 4}, "no head 4.*0 to 3"), ({"token": 999}, "999"), ({"image": 1}, "image 1")):
        with pytest.raises(InputError, match=words):
            cache.show(2, **arguments)
    with pytest.raises(InputError, match=r"cache\.inputs"):
        cache.apply_slice_to_batch_dim(0).show(2, 1)
    cache.inputs = replace(inputs, spec=replace(inputs.spec, image_processor=None))
    assert cache.show(2, 1, picture=page.image)
    with pytest.raises(InputError, match="picture="):
        cache.show(2, 1)
