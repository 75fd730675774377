"""Tensors of InternVL's vision tower and projector in both checkpoint layouts; `cfg` is `VisionConfig`'s arguments."""

from collections.abc import Mapping
from typing import Any

from hooked_vlm.converters.renaming import Rename, affine


def original_vision(cfg: Mapping[str, Any]) -> list[Rename]:
    """The published names: `vision_model.*` and `mlp1.*`, with q, k and v fused."""
    width = cfg["d_model"]
    table = _embeddings(
        cfg,
        ("vision_model.embeddings.class_embedding", "vision_model.embeddings.position_embedding"),
        "vision_model.embeddings.patch_embedding",
    )
    for layer in range(cfg["n_layers"]):
        theirs, ours = f"vision_model.encoder.layers.{layer}", f"vision.blocks.{layer}"
        qkv = tuple(f"{ours}.attn.{part}_proj" for part in "qkv")
        fused = affine(f"{theirs}.attn.qkv", qkv, (3 * width, width))
        table += [
            *_norm(cfg, f"{theirs}.norm1", f"{ours}.ln1"),
            *(fused if cfg["qkv_bias"] else fused[:1]),
            *_qk_norms(cfg, f"{theirs}.attn", f"{ours}.attn"),
            *affine(f"{theirs}.attn.proj", (f"{ours}.attn.o_proj",), (width, width)),
            *_norm(cfg, f"{theirs}.norm2", f"{ours}.ln2"),
            *_mlp_and_scales(cfg, theirs, ours, ("ls1", "ls2")),
        ]
    return table + _projector(cfg, ("mlp1.0", "mlp1.1", "mlp1.3"))


def hf_vision(cfg: Mapping[str, Any]) -> list[Rename]:
    """transformers' names: `vision_tower.*` and `multi_modal_projector.*`, with q, k and v apart."""
    width = cfg["d_model"]
    table = _embeddings(
        cfg,
        ("vision_tower.embeddings.cls_token", "vision_tower.embeddings.position_embeddings"),
        "vision_tower.embeddings.patch_embeddings.projection",
    )
    for layer in range(cfg["n_layers"]):
        theirs, ours = f"vision_tower.encoder.layer.{layer}", f"vision.blocks.{layer}"
        for part in "qkv":
            both = affine(f"{theirs}.attention.{part}_proj", (f"{ours}.attn.{part}_proj",), (width, width))
            table += both if cfg["qkv_bias"] else both[:1]
        table += [
            *_norm(cfg, f"{theirs}.layernorm_before", f"{ours}.ln1"),
            *_qk_norms(cfg, f"{theirs}.attention", f"{ours}.attn"),
            *affine(f"{theirs}.attention.projection_layer", (f"{ours}.attn.o_proj",), (width, width)),
            *_norm(cfg, f"{theirs}.layernorm_after", f"{ours}.ln2"),
            *_mlp_and_scales(cfg, theirs, ours, ("lambda_1", "lambda_2")),
        ]
    projector = "multi_modal_projector"
    return table + _projector(cfg, (f"{projector}.layer_norm", f"{projector}.linear_1", f"{projector}.linear_2"))


def _embeddings(cfg: Mapping[str, Any], tokens: tuple[str, str], patches: str) -> list[Rename]:
    width, side = cfg["d_model"], cfg["patch_size"]
    ours = "vision.patch_embed.proj"
    return [
        Rename(tokens[0], ("vision.tile_embed.class_token",), (1, 1, width)),
        Rename(tokens[1], ("vision.tile_embed.positions",), (1, 1 + cfg["n_positions"], width)),
        Rename(f"{patches}.weight", (f"{ours}.weight",), (width, cfg["in_channels"], side, side), flat=True),
        Rename(f"{patches}.bias", (f"{ours}.bias",), (width,)),
    ]


def _mlp_and_scales(cfg: Mapping[str, Any], theirs: str, ours: str, scales: tuple[str, str]) -> list[Rename]:
    width, d_mlp = cfg["d_model"], cfg["d_mlp"]
    return [
        *affine(f"{theirs}.mlp.fc1", (f"{ours}.mlp.in_proj",), (d_mlp, width)),
        *affine(f"{theirs}.mlp.fc2", (f"{ours}.mlp.out_proj",), (width, d_mlp)),
        Rename(f"{theirs}.{scales[0]}", (f"{ours}.scale_attn",), (width,)),
        Rename(f"{theirs}.{scales[1]}", (f"{ours}.scale_mlp",), (width,)),
    ]


def _norm(cfg: Mapping[str, Any], theirs: str, ours: str) -> list[Rename]:
    """A norm's tensors: LayerNorm has a bias, RMSNorm has none."""
    both = affine(theirs, (ours,), (cfg["d_model"],))
    return both if cfg["normalization_type"] == "LN" else both[:1]


def _qk_norms(cfg: Mapping[str, Any], theirs: str, ours: str) -> list[Rename]:
    parts = ("q_norm", "k_norm") if cfg["qk_norm"] else ()
    return [Rename(f"{theirs}.{part}.weight", (f"{ours}.{part}.weight",), (cfg["d_model"],)) for part in parts]


def _projector(cfg: Mapping[str, Any], names: tuple[str, str, str]) -> list[Rename]:
    merged, width = cfg["d_model"] * cfg["merge_size"] ** 2, cfg["d_out"]
    return [
        *affine(names[0], ("projector.ln",), (merged,)),
        *affine(names[1], ("projector.in_proj",), (width, merged)),
        *affine(names[2], ("projector.out_proj",), (width, width)),
    ]
