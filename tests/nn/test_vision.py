"""Vision towers and projectors of any values equal their formulas, written out in `towers`."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from towers import (
    EVERY_PART,
    GRIDS,
    ORDERS,
    PLAIN,
    PROJECTORS,
    drawn,
    features,
    pixels_of,
    places_of,
    plain_features,
    vlm,
    without,
)

from hooked_vlm import HookedVLM, InputError, VLMInputs, sweep
from hooked_vlm.interventions import CustomHooks
from hooked_vlm.metrics import logit
from hooked_vlm.model.hook_catalogue import hook_table
from hooked_vlm.model.hook_shapes import PromptSize, filled
from hooked_vlm.nn.hooks import HookPoint
from hooked_vlm.vision_config import VisionConfig

CASES = [
    pytest.param(name, order, id=f"{name}, {order}")
    for name in PROJECTORS
    for order in ORDERS
    if order == "raster" or "pool" not in PROJECTORS[name]["projector"]
]


def close(found: torch.Tensor, expected: torch.Tensor, cfg: VisionConfig) -> None:
    tolerance = 1e-10 if cfg.rope_theta is None else 1e-6  # angles are float32
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------- numbers


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "order"), CASES)
def test_features_equal_the_formulas(name: str, order: str, seed: int) -> None:
    cfg, grids = drawn(name, order, seed), GRIDS[order]
    model, pixels = vlm(cfg, seed), pixels_of(cfg, grids)
    expected = plain_features(cfg, model.state_dict(), pixels, grids)
    close(features(model, pixels, grids), expected, cfg)
    handle = model.vision.blocks[0].register_forward_hook(lambda *_: None)  # rows are padded then
    close(features(model, pixels, grids), expected, cfg)
    handle.remove()
    one, n = (
        grids[0],
        expected.shape[0] * grids[0][0] * grids[0][1] * grids[0][2] // sum(t * h * w for t, h, w in grids),
    )
    own = pixels[: one[0] if order == "raster" else one[0] * one[1] * one[2]]
    close(features(model, own, (one,)), expected[:n], cfg)


@torch.no_grad()
def test_one_picture_has_the_same_tokens_in_either_order() -> None:
    values = {**EVERY_PART, **PROJECTORS["InternVL"], "temporal_patch_size": 1}
    raster = VisionConfig(**{**values, "patch_order": "raster", "tile_size": 12})
    model = vlm(raster)
    blocks = without(raster, model, patch_order="blocks", tile_size=None)
    picture, p = pixels_of(raster, ((1, 4, 6),)), raster.patch_size
    places = places_of(blocks.cfg.vision, 4, 6)  # pyright: ignore[reportArgumentType]
    patches = torch.stack([picture[0, :, r * p : r * p + p, c * p : c * p + p].flatten() for r, c in places])
    close(features(blocks, patches, ((1, 4, 6),)), features(model, picture, ((1, 4, 6),)), raster)


@torch.no_grad()
def test_tokens_numbered_by_columns_are_those_by_rows() -> None:
    cfg = VisionConfig(**{**EVERY_PART, **ORDERS["raster"], **PROJECTORS["InternVL"], "transposed_tokens": True})
    grids, model = GRIDS["raster"], vlm(cfg)
    pixels = pixels_of(cfg, grids)
    by_columns = features(model, pixels, grids)
    close(by_columns, plain_features(cfg, model.state_dict(), pixels, grids), cfg)
    by_rows = features(without(cfg, model, transposed_tokens=False), pixels, grids)
    close(by_columns.view(3, 3, 2, -1).transpose(1, 2), by_rows.view(3, 2, 3, -1), cfg)


TAKEN_AWAY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # value: (what the tower has besides, what takes the value away)
    **{value: ({}, {value: False}) for value in ("patch_bias", "pre_norm", "post_norm", "gated_mlp", "layer_scale")},
    "class_token": ({"n_positions": 0}, {"class_token": False}),
    "learned positions": ({}, {"n_positions": 0}),
    "bicubic": ({}, {"position_fit": "bilinear"}),
    "RMS norms": ({"normalization_type": "RMS"}, {"normalization_type": "LN"}),
    "gelu_tanh": ({"act_fn": "gelu_tanh"}, {"act_fn": "gelu"}),
    "blocks left out": ({"n_layers_used": 1}, {"n_layers_used": None}),
    "norm of patches": ({}, {"projector": ("merge", "linear", "activation", "linear")}),
    "norm of tokens": (PROJECTORS["InternVL"], {"projector": ("merge", "linear", "activation", "linear")}),
    "activation": (
        {**PROJECTORS["PaliGemma"], "projector": ("linear", "activation", "linear")},
        {"projector": ("linear",)},
    ),
    "projector_norm_type": (PROJECTORS["Qwen2.5-VL"], {"projector_norm_type": "LN"}),
    "projector_bias": ({}, {"projector_bias": False}),
}


@torch.no_grad()
@pytest.mark.parametrize("value", TAKEN_AWAY)
def test_taking_a_value_away_moves_numbers(value: str) -> None:
    besides, changes = TAKEN_AWAY[value]
    cfg = VisionConfig(**{**EVERY_PART, **ORDERS["blocks"], **PROJECTORS["Qwen2-VL, Qwen3-VL"], **besides})
    model, grids = vlm(cfg), GRIDS["blocks"]
    pixels = pixels_of(cfg, grids)
    moved = features(without(cfg, model, **changes), pixels, grids) - features(model, pixels, grids)
    assert moved.abs().amax(-1).min() > 1e-8, "some token is the same"


@torch.no_grad()
def test_a_mean_of_patches_is_none_of_them() -> None:
    cfg = VisionConfig(**{**EVERY_PART, **ORDERS["raster"], **PROJECTORS["Gemma 3"]})
    model, grids = vlm(cfg), GRIDS["raster"]
    pixels = pixels_of(cfg, grids)
    pooled = features(model, pixels, grids)
    single = without(cfg, model, pool_size=1, projector=("norm", "linear"))
    patches = features(single, pixels, grids).view(3, 4, 6, -1)
    assert (patches[:, ::2, ::2].flatten(0, 2) - pooled).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_a_table_of_positions_fits_its_own_pictures_only() -> None:
    tables = {"n_positions": 36, "position_fit": "table"}
    cfg = VisionConfig(**{**EVERY_PART, **ORDERS["raster"], **PROJECTORS["PaliGemma"], **tables})
    model, square = vlm(cfg), ((2, 6, 6),)
    pixels = pixels_of(cfg, square)
    for fit in ("table", "bicubic", "bilinear"):  # nothing is resized where sizes are equal
        assert features(without(cfg, model, position_fit=fit), pixels, square).equal(features(model, pixels, square))
    with pytest.raises(InputError, match=r"positions for 6 x 6 patches, got a picture of 4 x 6.*12 pixels"):
        features(model, pixels_of(cfg, ((1, 4, 6),)), ((1, 4, 6),))


def test_pixels_beyond_the_last_whole_patch_are_never_seen() -> None:
    cfg = VisionConfig(**{**EVERY_PART, **ORDERS["raster"], **PROJECTORS["PaliGemma"], "tile_size": 13})
    model, pixels = vlm(cfg), torch.randn(1, 3, 13, 13, dtype=torch.float64)
    seen = features(model, pixels, ((1, 6, 6),))
    assert seen.equal(features(model, pixels[:, :, :12, :12], ((1, 6, 6),)))


@pytest.mark.parametrize(("name", "order"), CASES)
def test_gradients_reach_every_weight_and_pixel(name: str, order: str) -> None:
    cfg, grids = VisionConfig(**{**EVERY_PART, **ORDERS[order], **PROJECTORS[name]}), GRIDS[order]
    model, pixels = vlm(cfg), pixels_of(cfg, grids).requires_grad_()
    found = features(model, pixels, grids)
    (found * torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(5))).sum().backward()
    weights = {n: p.grad for n, p in model.named_parameters() if n.startswith(("vision.", "projector."))}
    # keys' biases shift all scores of a query alike
    dead = [n for n, g in weights.items() if not n.endswith("k_proj.bias") and (g is None or not g.abs().max() > 1e-9)]
    assert dead == [] and pixels.grad is not None and pixels.grad.abs().amax(-1).min() > 0


# ---------------------------------------------------------------- hook points


def with_hooks(model: HookedVLM, name: Any, hook: Callable, pixels: torch.Tensor, grids: Any) -> torch.Tensor:
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, hook)]):
        return features(model, pixels, grids)


@pytest.mark.parametrize(("name", "order"), CASES)
def test_hooks_fire_once_with_the_shape_of_the_table_and_act(name: str, order: str) -> None:
    cfg, grids = VisionConfig(**{**EVERY_PART, **ORDERS[order], **PROJECTORS[name]}), GRIDS[order]
    model, pixels = vlm(cfg), pixels_of(cfg, grids)
    with torch.no_grad():
        plain = features(model, pixels, grids)
    seen = [h * w for t, h, w in grids for _ in range(t)]
    prompt = PromptSize(0, len(seen), max(seen) + 1, max(seen) // cfg.token_size**2)
    rows = {row.name: row for row in hook_table(model)}
    live = [n for n in model.hook_dict if n.startswith(("vision.", "projector.")) and not n.endswith("hook_result")]
    fired: Counter[str] = Counter()

    def look(x: torch.Tensor, hook: HookPoint) -> None:
        fired[hook.name or ""] += 1
        row = rows[".".join("{l}" if part.isdigit() else part for part in str(hook.name).split("."))]
        assert tuple(x.shape) == filled(row, model.cfg, prompt), hook.name

    close(with_hooks(model, lambda n: n in live, look, pixels, grids), plain, cfg)
    assert fired == dict.fromkeys(live, 1)
    for point in live:
        edits = (lambda x, hook: x * torch.linspace(1, 2, x.shape[-1]).to(x), lambda x, hook: 2 * x)
        edited = (with_hooks(model, point, edit, pixels, grids) for edit in edits)
        assert any((e - plain).abs().max() > 1e-6 for e in edited), point
        same = with_hooks(model, point, lambda x, hook: x.clone(), pixels, grids)
        close(same, plain, cfg)


@pytest.mark.parametrize(
    ("values", "points"),
    [
        ({"pre_norm": True}, {"vision.ln_pre"}),
        ({"post_norm": True}, {"vision.ln_post"}),
        ({"gated_mlp": True}, {"vision.blocks.0.mlp", "vision.blocks.1.mlp"}),
        (PROJECTORS["LLaVA"], set()),
    ],
)
def test_hook_points_exist_where_their_parts_do(values: dict[str, Any], points: set[str]) -> None:
    plain = VisionConfig(**PLAIN)
    before, after = (set(vlm(replace(plain, **v)).hook_dict) for v in ({}, values))
    assert {name.rpartition(".")[0] for name in after - before} == points
    lacking = before - after
    assert lacking == ({n for n in before if n.startswith("projector.ln.")} if values is PROJECTORS["LLaVA"] else set())
    linear = vlm(replace(plain, **PROJECTORS["PaliGemma"]))
    assert not any(name.startswith("projector.") for name in linear.hook_dict)


def scaled(factor: float, x: torch.Tensor, hook: HookPoint) -> torch.Tensor:
    return x * torch.linspace(1, factor, x.shape[-1]).to(x)


@torch.no_grad()
@pytest.mark.parametrize("point", ["vision.hook_embed", "vision.ln_pre.hook_out", "vision.ln_post.hook_normalized"])
def test_sweeps_over_the_norms_of_a_tower_equal_the_loop(point: str) -> None:
    cfg = VisionConfig(**{**EVERY_PART, **ORDERS["blocks"], **PROJECTORS["Qwen2-VL, Qwen3-VL"], "class_token": False})
    model, grid = vlm(cfg), (1, 4, 4)
    inputs = VLMInputs(
        torch.tensor([[5, *[1] * 4, 6, 7]]),
        model.input_spec(),
        pixel_values=pixels_of(cfg, (grid,)),
        image_grid_thw=torch.tensor([grid]),
    )
    both = [CustomHooks([(point, partial(scaled, factor))]) for factor in (0.5, 2.0)]
    swept = sweep(model, inputs, both, logit(3))
    clean = float(model(inputs)[0, -1, 3])
    for i, intervention in enumerate(both):
        alone = float(model.run_with_hooks(inputs, fwd_hooks=intervention.hooks(model, inputs))[0, -1, 3])
        assert abs(alone - clean) > 1e-6
        assert abs(float(swept.values[i, 0]) - alone) < 1e-9


# ---------------------------------------------------------------- weights and values


def test_weights_keep_their_names_and_exist_where_their_parts_do() -> None:
    every = VisionConfig(**{**EVERY_PART, **ORDERS["raster"], **PROJECTORS["InternVL"]})
    names = {
        name
        for name in vlm(every).state_dict()
        if name.startswith(("vision.", "projector.")) and ".blocks." not in name
    }
    both = ("weight", "bias")
    assert names == {
        *(f"vision.{part}.{own}" for part in ("patch_embed.proj", "ln_pre", "ln_post") for own in both),
        *(f"vision.tile_embed.{own}" for own in ("class_token", "positions")),
        *(f"projector.{part}.{own}" for part in ("ln", "in_proj", "out_proj") for own in both),
    }
    least = vlm(VisionConfig(**{**PLAIN, **PROJECTORS["Idefics3"]}))
    found = {
        name for name in least.state_dict() if name.startswith(("vision.", "projector.")) and ".blocks." not in name
    }
    assert found == {"vision.patch_embed.proj.weight", "projector.out_proj.weight"}
    copy = vlm(every, seed=9)
    copy.load_state_dict(vlm(every).state_dict(), strict=True)
    pixels = pixels_of(every, GRIDS["raster"])
    assert features(copy, pixels, GRIDS["raster"]).equal(features(vlm(every), pixels, GRIDS["raster"]))


def test_a_gated_mlp_shows_its_weights_and_biases() -> None:
    mlp: Any = vlm(VisionConfig(**{**PLAIN, "gated_mlp": True})).vision.blocks[0].mlp
    assert mlp.W_gate is not None and mlp.W_gate.shape == mlp.W_in.shape == (8, 12)
    assert all(linear.bias is not None for linear in (mlp.gate_proj, mlp.in_proj, mlp.out_proj))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"projector": ("norm", "merge", "merge", "linear")}, "each at most once"),
        ({"projector": ("norm", "merge")}, 'must end in one "linear"'),
        ({"projector": ("merge", "linear", "norm")}, 'must end in one "linear"'),
        ({"projector": ("merge", "linear", "linear")}, 'must end in one "linear"'),
        ({"projector": ("merge", "activation", "linear")}, 'begins with "norm", "merge" and "pool"'),
        ({"projector": ("merge", "pool", "linear")}, "not by both"),
        ({"projector": ("linear",)}, 'merge_size must be 1 in a projector without "merge".*got 2'),
        ({"pool_size": 2}, 'pool_size must be 1 in a projector without "pool".*got 2'),
        ({"projector": ("merge", "linear"), "d_projector": 5}, "width between two linear maps, got 5"),
        ({"patch_order": "raster"}, 'patch_order="raster" must be the side of its square pictures, got None'),
        ({"tile_size": 12}, 'patch_order="blocks" must be None'),
        ({**ORDERS["raster"], "temporal_patch_size": 2}, "temporal_patch_size=1, got 2"),
        ({**PROJECTORS["Gemma 3"]}, '"pool" needs patch_order="raster"'),
        ({"rope_theta": 1e4, "class_token": True}, "set rope_theta=None, got 10000.0"),
        ({"n_positions": 8, "position_fit": "bilinear"}, "square table, got 8"),
        ({"n_positions": 9}, 'any shape need position_fit="bicubic" or "bilinear"'),
        ({**ORDERS["raster"], "n_positions": 9, "position_fit": "table"}, "6 x 6, got n_positions=9"),
        ({**ORDERS["raster"], "tile_size": 10}, "5 rows of patches, which must be a multiple of the 2 of a token"),
        ({"full_layers": (2,)}, "full_layers must be different blocks that run, 0 to 1"),
        ({"full_layers": (1,), "n_layers_used": 1}, "full_layers must be different blocks that run, 0 to 0"),
    ],
)
def test_values_that_make_no_tower_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        VisionConfig(**{**PLAIN, **values})
