"""Vision towers and projectors written out in plain PyTorch, picture by picture, and small models of any configuration.

Nothing here is the library's: weights are read by name from a state dict, and every step is its formula.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from tiny import randomise
from torch import Tensor

from hooked_vlm import HookedVLM
from hooked_vlm.config import VLMConfig
from hooked_vlm.nn.vision import image_pass
from hooked_vlm.vision_config import VisionConfig

Weights = dict[str, Tensor]
Grid = tuple[int, int, int]

MLP = ("linear", "activation", "linear")
PROJECTORS: dict[str, dict[str, Any]] = {
    "Qwen2-VL, Qwen3-VL": {"projector": ("norm", "merge", *MLP), "merge_size": 2},
    "Qwen2.5-VL": {"projector": ("norm", "merge", *MLP), "merge_size": 2, "projector_norm_type": "RMS"},
    "Qwen3-VL, DeepStack": {"projector": ("merge", "norm", *MLP), "merge_size": 2},
    "InternVL": {"projector": ("merge", "norm", *MLP), "merge_size": 2, "d_projector": 10},
    "LLaVA": {"projector": MLP, "merge_size": 1, "d_projector": 10},
    "PaliGemma": {"projector": ("linear",), "merge_size": 1},
    "Idefics3": {"projector": ("merge", "linear"), "merge_size": 2, "projector_bias": False},
    "Gemma 3": {
        "projector": ("pool", "norm", "linear"),
        "merge_size": 1,
        "pool_size": 2,
        "projector_norm_type": "RMS",
        "projector_bias": False,
    },
}
SIZES: dict[str, Any] = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_head": 4, "d_mlp": 12, "d_out": 6}
ORDERS: dict[str, dict[str, Any]] = {
    "blocks": {"patch_order": "blocks", "temporal_patch_size": 2},
    "raster": {"patch_order": "raster", "temporal_patch_size": 1, "tile_size": 12},
}
PLAIN: dict[str, Any] = {**SIZES, "patch_size": 2, "rope_theta": None, "act_fn": "gelu"}
EVERY_PART: dict[str, Any] = {
    **PLAIN,
    "class_token": True,
    "n_positions": 9,
    "position_fit": "bicubic",
    **dict.fromkeys(("patch_bias", "pre_norm", "post_norm", "gated_mlp", "layer_scale"), True),
}
"""A tower with everything that a value adds."""
GRIDS: dict[str, tuple[Grid, ...]] = {"blocks": ((1, 4, 6), (2, 2, 4), (1, 4, 6)), "raster": ((2, 4, 6), (1, 4, 6))}
"""Of several pictures in either order: of two sizes and with two frames, or all of one size that is not square."""


def drawn(name: str, order: str, seed: int) -> VisionConfig:
    """A family's projector behind a tower whose values are drawn."""
    draw = random.Random(f"{name} {order} {seed}")
    values: dict[str, Any] = {
        "class_token": draw.random() < 0.5,
        "n_positions": draw.choice((0, 9, 36)),
        "position_fit": draw.choice(("bicubic", "bilinear")),
        **{part: draw.random() < 0.5 for part in ("patch_bias", "pre_norm", "post_norm", "gated_mlp", "layer_scale")},
        "normalization_type": draw.choice(("LN", "RMS")),
        "act_fn": draw.choice(("gelu", "gelu_tanh", "quick_gelu", "silu")),
        "n_layers_used": draw.choice((None, 1)),
    }
    if order == "blocks" and not values["class_token"]:
        values["rope_theta"] = draw.choice((None, 100.0))
    return VisionConfig(**{**PLAIN, **ORDERS[order], **PROJECTORS[name], **values})


def vlm(vision: VisionConfig, seed: int = 0) -> HookedVLM:
    """A model in float64 with this tower and random weights."""
    cfg = VLMConfig(
        n_layers=1, d_model=vision.d_out, n_heads=1, n_key_value_heads=1, d_head=vision.d_out, d_mlp=8, d_vocab=16,
        n_ctx=128, rope_theta=1e4, image_token_id=1, vision=vision,
    )  # fmt: skip
    model = HookedVLM(cfg).eval().to(torch.float64)
    randomise(model, seed)
    return model


def pixels_of(cfg: VisionConfig, grids: Sequence[Grid], seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n, (rows, cols) = sum(t for t, _, _ in grids), grids[0][1:]
    patches = (sum(t * h * w for t, h, w in grids), cfg.d_patch)
    pictures = (n, cfg.in_channels, rows * cfg.patch_size, cols * cfg.patch_size)
    shape = patches if cfg.patch_order == "blocks" else pictures
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def features(model: HookedVLM, pixels: Tensor, grids: tuple[Grid, ...]) -> Tensor:
    """Of the model itself."""
    here = image_pass(model, grids, torch.device("cpu"))
    return model.projector(model.vision(pixels, grids, here), grids, here)


def without(cfg: VisionConfig, model: HookedVLM, **changes: Any) -> HookedVLM:
    """The same weights in a model of other values; those that have no place there are left out."""
    other = vlm(replace(cfg, **changes), seed=3)
    wanted, given = other.state_dict(), model.state_dict()
    other.load_state_dict({name: given.get(name, own) for name, own in wanted.items()})
    return other


# ---------------------------------------------------------------- written out


def plain_features(cfg: VisionConfig, weights: Weights, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Image tokens of all pictures, one picture after the other."""
    tokens, start = [], 0
    for picture, (rows, cols) in enumerate((h, w) for t, h, w in grids for _ in range(t)):
        places = places_of(cfg, rows, cols)
        if cfg.patch_order == "blocks":
            patches = pixels[start : start + len(places)]
            start += len(places)
        else:
            p = cfg.patch_size
            squares = [pixels[picture, :, r * p : r * p + p, c * p : c * p + p] for r, c in places]
            patches = torch.stack([square.flatten() for square in squares])
        stream = plain_tower(cfg, weights, patches, places, (rows, cols))
        tokens.append(plain_projector(cfg, weights, stream, places, (rows, cols)))
    return torch.cat(tokens)


def places_of(cfg: VisionConfig, rows: int, cols: int) -> list[tuple[int, int]]:
    """Row and column of every patch in its order."""
    m = 1 if cfg.patch_order == "raster" else cfg.merge_size
    blocks = [(r, c) for r in range(0, rows, m) for c in range(0, cols, m)]
    return [(r + i, c + j) for r, c in blocks for i in range(m) for j in range(m)]


def plain_tower(
    cfg: VisionConfig, weights: Weights, patches: Tensor, places: list[tuple[int, int]], size: tuple[int, int]
) -> Tensor:
    """The stream of one picture that the projector reads, class token included."""
    stream = patches @ weights["vision.patch_embed.proj.weight"].T
    if cfg.patch_bias:
        stream = stream + weights["vision.patch_embed.proj.bias"]
    if cfg.n_positions:
        table = weights["vision.tile_embed.positions"][0]
        stream = stream + positions(cfg, table[int(cfg.class_token) :], places, size)
    if cfg.class_token:
        token = weights["vision.tile_embed.class_token"][0]
        if cfg.n_positions:
            token = token + weights["vision.tile_embed.positions"][0, :1]
        stream = torch.cat((token, stream))
    if cfg.pre_norm:
        stream = norm(cfg.normalization_type, weights, "vision.ln_pre", stream, cfg.eps)
    for layer in range(cfg.n_layers if cfg.n_layers_used is None else cfg.n_layers_used):
        stream = plain_block(cfg, weights, f"vision.blocks.{layer}", stream, places)
    if cfg.post_norm:
        stream = norm(cfg.normalization_type, weights, "vision.ln_post", stream, cfg.eps)
    return stream


def positions(cfg: VisionConfig, table: Tensor, places: list[tuple[int, int]], size: tuple[int, int]) -> Tensor:
    """The table's entries at the patches' places: bilinear written out, bicubic as PyTorch resizes a picture."""
    side = round(cfg.n_positions**0.5)
    square = table.view(side, side, -1)
    if cfg.position_fit == "bicubic":
        picture = square.permute(2, 0, 1)[None]
        fitted = F.interpolate(picture, size=size, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
        return torch.stack([square[r, c] if size == (side, side) else fitted[r, c] for r, c in places])
    found = []
    for place in places:
        y, x = (at * (side - 1) / (n - 1) for at, n in zip(place, size, strict=True))
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, side - 1), min(x0 + 1, side - 1)
        above = (1 - (x - x0)) * square[y0, x0] + (x - x0) * square[y0, x1]
        below = (1 - (x - x0)) * square[y1, x0] + (x - x0) * square[y1, x1]
        found.append((1 - (y - y0)) * above + (y - y0) * below)
    return torch.stack(found)


def norm(kind: str, weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    if kind == "LN":
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]


def affine(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def activation(kind: str, x: Tensor) -> Tensor:
    if kind == "gelu":
        return x * (1 + torch.erf(x / 2**0.5)) / 2
    if kind == "gelu_tanh":
        return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return x * torch.sigmoid(x * (1.702 if kind == "quick_gelu" else 1))


def plain_block(
    cfg: VisionConfig, weights: Weights, name: str, stream: Tensor, places: list[tuple[int, int]]
) -> Tensor:
    x = norm(cfg.normalization_type, weights, f"{name}.ln1", stream, cfg.eps)
    q, k, v = (affine(weights, f"{name}.attn.{part}_proj", x) for part in "qkv")
    z = []
    for head in range(cfg.n_heads):
        own = slice(head * cfg.d_head, (head + 1) * cfg.d_head)
        query, key = (rotated(cfg, both[:, own], places) for both in (q, k))
        z.append((query @ key.T / cfg.d_head**0.5).softmax(-1) @ v[:, own])
    added = affine(weights, f"{name}.attn.o_proj", torch.cat(z, -1))
    stream = stream + (added * weights[f"{name}.scale_attn"] if cfg.layer_scale else added)
    x = norm(cfg.normalization_type, weights, f"{name}.ln2", stream, cfg.eps)
    hidden = affine(weights, f"{name}.mlp.in_proj", x)
    if cfg.gated_mlp:
        hidden = activation(cfg.act_fn, affine(weights, f"{name}.mlp.gate_proj", x)) * hidden
    else:
        hidden = activation(cfg.act_fn, hidden)
    added = affine(weights, f"{name}.mlp.out_proj", hidden)
    return stream + (added * weights[f"{name}.scale_mlp"] if cfg.layer_scale else added)


def rotated(cfg: VisionConfig, x: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """The first quarter of the coordinates turns with the row, the second with the column, each with its partner half a
    head further on."""
    if cfg.rope_theta is None:
        return x
    half, quarter = cfg.d_head // 2, cfg.d_head // 4
    speeds = torch.tensor([cfg.rope_theta ** (-i / quarter) for i in range(quarter)], dtype=x.dtype)
    angles = torch.cat([torch.tensor(places, dtype=x.dtype)[:, axis, None] * speeds for axis in (0, 1)], -1)
    a, b = x[:, :half], x[:, half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def plain_projector(
    cfg: VisionConfig, weights: Weights, stream: Tensor, places: list[tuple[int, int]], size: tuple[int, int]
) -> Tensor:
    x = stream[int(cfg.class_token) :]
    maps = ["in_proj", "out_proj"] if cfg.projector.count("linear") == 2 else ["out_proj"]
    for step in cfg.projector:
        if step == "norm":
            x = norm(cfg.projector_norm_type, weights, "projector.ln", x, cfg.projector_eps)
        elif step in ("merge", "pool"):
            n, at = (cfg.merge_size if step == "merge" else cfg.pool_size), dict(zip(places, x, strict=True))
            corners = [(r, c) for r in range(0, size[0], n) for c in range(0, size[1], n)]
            if cfg.transposed_tokens:
                corners.sort(key=lambda corner: corner[::-1])
            blocks = [[at[r + i, c + j] for i in range(n) for j in range(n)] for r, c in corners]
            x = torch.stack([torch.cat(block) if step == "merge" else torch.stack(block).mean(0) for block in blocks])
        elif step == "activation":
            x = activation("gelu", x)
        else:
            x = affine(weights, f"projector.{maps.pop(0)}", x)
    return x
