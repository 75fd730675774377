"""Interventions of every kind, for laws that hold for all of them."""

from typing import Any

import torch

from hooked_vlm import interventions as iv
from hooked_vlm.interventions.base import n_patches

KINDS = (
    "zero",
    "scale",
    "mean",
    "image mean",
    "image mean after RoPE",
    "image zero",
    "image knocked out",
    "image mean of a dataset",
    "some image tokens, some queries",
    "blocked",
    "sink",
    "uniform",
    "uniform while generating",
    "patch",
    "steering",
    "image tokens",
    "together",
)
HEADS = ((0, 1), (1, 0), (1, 3), (2, 2))


def some_of_the_image(batch: Any) -> tuple[tuple[int, ...], ...]:
    """The second and every third token after it."""
    return tuple(tuple(positions[1::3].tolist()) for positions in batch.positions.image)


VISION_KINDS = (
    "zero",
    "scale some patches",
    "mean",
    "blocked",
    "blocked from some to some",
    "uniform",
    "uniform, some patches of each image",
    "patched head",
    "patched pattern",
    "together",
)
VISION_HEADS = ((0, 1), (1, 0), (1, 1))


def of_every_vision_kind(model: Any, batch: Any) -> dict[str, iv.Intervention]:
    """One intervention of each kind on heads of the vision tower."""
    names = ["vision.blocks.1.attn.hook_z", "vision.blocks.1.attn.hook_pattern"]
    with torch.no_grad(), model.hooks(fwd_hooks=[("vision.hook_embed", lambda x, hook: x.flip(-1))]):
        _, other = model.run_with_cache(batch, names_filter=names)
    of: Any = {"tower": "vision"}
    each = tuple(tuple(range(image % 3, 8)) for image in range(len(n_patches(batch))))
    both = (iv.ZeroHeads(((1, 0),), **of), iv.ZeroHeads(((1, 0),)), iv.UniformAttention(((0, 1),), **of))
    kinds: dict[str, iv.Intervention] = {
        "zero": iv.ZeroHeads(VISION_HEADS, **of),
        "scale some patches": iv.ScaleHeads(VISION_HEADS, -1.0, (1, 3), **of),
        "mean": iv.MeanHeads(VISION_HEADS, iv.mean_head_outputs(model, [batch], **of), **of),
        "blocked": iv.BlockAttention(((1, 0),), **of),
        "blocked from some to some": iv.BlockAttention(VISION_HEADS, (0, 2), (1, 2), **of),
        "uniform": iv.UniformAttention(VISION_HEADS, **of),
        "uniform, some patches of each image": iv.UniformAttention(VISION_HEADS, each, **of),
        "patched head": iv.PatchActivation(names[0], other[names[0]], (0, 1), (1,)),
        "patched pattern": iv.PatchActivation(names[1], other[names[1]], None, (0,)),
        "together": iv.Compose(both),
    }
    assert tuple(kinds) == VISION_KINDS
    return kinds


def of_every_kind(model: Any, batch: Any) -> dict[str, iv.Intervention]:
    """One intervention of each kind that acts on the text side."""
    generator = torch.Generator().manual_seed(1)
    _, cache = model.run_with_cache(batch)
    vector = torch.randn(model.cfg.d_model, generator=generator)
    kinds: dict[str, iv.Intervention] = {
        "zero": iv.ZeroHeads(HEADS),
        "scale": iv.ScaleHeads(HEADS, 0.5, "text"),
        "mean": iv.MeanHeads(HEADS, iv.mean_head_outputs(model, [batch])),
        "image mean": iv.ReplaceImageKV(HEADS),
        "image mean after RoPE": iv.ReplaceImageKV(HEADS, before_rope=False),
        "image zero": iv.ReplaceImageKV(HEADS, "zero"),
        "image knocked out": iv.ReplaceImageKV(HEADS, "knockout"),
        "image mean of a dataset": iv.ReplaceImageKV(HEADS, iv.mean_image_kv(model, [batch])),
        "some image tokens, some queries": iv.ReplaceImageKV(HEADS, queries="text", tokens=some_of_the_image(batch)),
        "blocked": iv.BlockAttention(HEADS, "text", "image"),
        "sink": iv.RedistributeSink(HEADS, 0.3),
        "uniform": iv.UniformAttention(HEADS),
        "uniform while generating": iv.UniformAttention(HEADS, "generated"),
        "patch": iv.PatchActivation("blocks.1.hook_resid_mid", cache["resid_mid", 2], "question"),
        "steering": iv.AddVector("blocks.1.hook_resid_post", vector, positions="text"),
        "image tokens": iv.ReplaceImageTokens("image", "mean"),
        "together": iv.Compose((iv.ZeroHeads(((2, 0),)), iv.BlockAttention(((1, 1),), "final", "image"))),
    }
    assert tuple(kinds) == KINDS
    return kinds
