"""Windows of a vision tower: patches attend in groups of windows as under the mask written out."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import own_copy
from hypothesis import given
from hypothesis import strategies as st
from largest import Largest
from tiny_qwen2_vl import hf_batch, tiny_model

from hooked_vlm.nn.attention import attend, grouped_attention
from hooked_vlm.nn.hooks import HookPoint
from hooked_vlm.nn.masks import AttentionMask
from hooked_vlm.nn.packing import Windows
from hooked_vlm.nn.vision import image_pass
from hooked_vlm.vision_config import VisionConfig

CPU = torch.device("cpu")
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}
ROWS = {
    "one size": [[5, ("image", (1, 8, 12)), 7, ("image", (1, 8, 12))]],
    "several sizes": [[5, ("image", (1, 14, 10)), 7, ("image", (1, 4, 6)), 8, ("image", (1, 8, 8))]],
    "video": [[5, ("video", (3, 6, 10)), 7, ("image", (1, 2, 12))]],
}


def windowed(window: int | None = 4, full_layers: tuple[int, ...] = (1,)) -> Any:
    model = own_copy(tiny_model(False))
    vision = replace(model.cfg.vision, window=window, full_layers=full_layers)
    model.cfg = model.cfg.with_(vision=vision)
    return model


def window_of_patches(grid: tuple[int, int, int], window: int) -> list[tuple[int, int, int]]:
    """(slice, row, column) of the window of every patch, merge block by merge block."""
    t, h, w = grid
    return [
        (time, (2 * row + y) // window, (2 * col + x) // window)
        for time in range(t)
        for row in range(h // 2)
        for col in range(w // 2)
        for y in range(2)
        for x in range(2)
    ]


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=20), st.integers(0, 99))
def test_attention_in_windows_is_that_of_the_mask_written_out(numbers: list[int], seed: int) -> None:
    present = sorted({number for number in numbers if number >= 0})
    dense_numbers = np.array([present.index(n) if n >= 0 else -1 for n in numbers])
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 1, len(numbers), 2, 4)
    grouped = grouped_attention(q, k, v, Windows(dense_numbers, CPU).groups, causal=False, packed=False)
    blocks = torch.from_numpy(dense_numbers)[None]
    listening = HookPoint()
    listening.add_hook(lambda tensor, hook: None)
    mask = AttentionMask(False, blocks >= 0, blocks=blocks)
    torch.testing.assert_close(grouped, attend(q, k, v, mask, HookPoint(), listening), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("window", [2, 4, 6, 20])
@torch.no_grad()
def test_grouped_windows_are_the_dense_mask_and_patterns_lie_within_them(rows: str, window: int) -> None:
    model = windowed(window)
    inputs = model.inputs_from_hf(hf_batch(ROWS[rows]))
    features = model.encode_images(inputs)
    _, explicit = model.run_with_cache(inputs, names_filter=lambda n: n.endswith(("hook_pattern", "image_features")))
    torch.testing.assert_close(explicit["hook_image_features"], features, **CLOSE)
    _, cache = model.run_with_cache(inputs)
    images = [own for grid in inputs.grids for own in _by_slice(grid, window)]
    for layer in range(2):
        stored = explicit[f"vision.blocks.{layer}.attn.hook_pattern"]
        torch.testing.assert_close(cache[f"vision.blocks.{layer}.attn.hook_pattern"], stored, **CLOSE)
        for image, own in enumerate(images):
            together = torch.tensor([[a == b or layer == 1 for b in own] for a in own])
            assert torch.equal(stored[image, 0, : len(own), : len(own)] > 0, together)
            assert not stored[image, :, :, len(own) :].any() and not stored[image, :, len(own) :].any()


def _by_slice(grid: tuple[int, int, int], window: int) -> list[list[tuple[int, int, int]]]:
    own, n = window_of_patches(grid, window), grid[1] * grid[2]
    return [own[start : start + n] for start in range(0, len(own), n)]


@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_windows_are_the_same_without_packing_and_image_by_image(rows: str) -> None:
    model = windowed()
    inputs = model.inputs_from_hf(hf_batch(ROWS[rows]))
    features = model.encode_images(inputs)
    handle = model.vision.blocks[0].mlp.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(model.encode_images(inputs), features, **CLOSE)
    handle.remove()
    n = 0
    for visual in inputs.in_feature_order:
        pixels = inputs.pixel_values if visual.kind == "image" else inputs.pixel_values_videos
        before = [v for v in inputs.visuals if v.kind == visual.kind and v.index < visual.index]
        first = sum(np.prod(v.grid) for v in before)
        own = pixels[first : first + np.prod(visual.grid)]
        here = image_pass(model, (visual.grid,), CPU)
        alone = model.projector(model.vision(own, (visual.grid,), here), (visual.grid,), here)
        torch.testing.assert_close(alone, features[n : n + visual.n_tokens], **CLOSE)
        n += visual.n_tokens


@torch.no_grad()
def test_windows_and_the_layers_without_them_move_numbers() -> None:
    inputs = tiny_model(False).inputs_from_hf(hf_batch(ROWS["several sizes"]))
    settings = ((None, ()), (4, ()), (4, (0,)), (4, (1,)), (6, (1,)))
    features = [windowed(*setting).encode_images(inputs) for setting in settings]
    for i, one in enumerate(features):
        assert all((one - other).abs().max() > 1e-3 for other in features[:i])
    assert torch.equal(windowed(4, (0, 1)).encode_images(inputs), features[0])


@torch.no_grad()
def test_no_tensor_is_quadratic_in_the_image() -> None:
    model = windowed(4, ())
    inputs = model.inputs_from_hf(hf_batch([[5, ("image", (1, 48, 32)), 7], [5, ("image", (1, 40, 32)), 7]]))
    with Largest() as made:
        model.encode_images(inputs)
    assert made.numel < (40 * 32) ** 2


RASTER = {"temporal_patch_size": 1, "rope_theta": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 3}, "multiple of merge_size"),
        ({"window": 4, "full_layers": (2,)}, "0 to 1"),
        ({"full_layers": (1,)}, "window is None"),
        ({"window": 4, "tile_size": 28, "patch_order": "raster", **RASTER}, "blocks"),
    ],
    ids=str,
)
def test_windows_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionConfig(2, 32, 2, 16, 64, 64, **changes)
