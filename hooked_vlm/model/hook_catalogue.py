"""The table of hook points: names, shapes, when they fire, what they are."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hooked_vlm.vision_config import VisionConfig

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True)
class HookRow:
    """One hook point, or the same one of every layer."""

    name: str
    """With `{l}` for the layer."""
    shape: tuple[str, ...]
    """Names of the axes; a number stands for itself."""
    fires: str
    """How often in one forward pass."""
    what: str


ONCE = "once"
RESULT = "with use_attn_result"
SPLIT = "with use_split_qkv_input"
ATTN_IN = "with use_attn_in"
MLP_IN = "with use_hook_mlp_in"
IMAGES = "once, if there are images"
ENCODES = "once, if images are encoded"


def _norm(name: str, where: str, out: str) -> dict[str, tuple[str, str, str]]:
    """Rows of a block's norm."""
    return {
        f"{name}.hook_scale": ("1", ONCE, f"denominator of the norm {where}"),
        f"{name}.hook_normalized": ("d_model", ONCE, "normalised stream before the norm's weight and bias"),
        f"{name}.hook_out": ("d_model", ONCE, out),
    }


# suffix: (axes after those of batch and position, when it fires, what it is), in the order of the forward pass
_BLOCK = {
    "hook_resid_pre": ("d_model", ONCE, "residual stream entering the block"),
    "attn.hook_attn_in": ("head d_model", ATTN_IN, "what each head reads, before ln1"),
    "attn.hook_q_input": ("head d_model", SPLIT, "what each query head reads, before ln1"),
    "attn.hook_k_input": ("kv_head d_model", SPLIT, "what each key head reads, before ln1"),
    "attn.hook_v_input": ("kv_head d_model", SPLIT, "what each value head reads, before ln1"),
    **_norm("ln1", "before attention", "what attention reads"),
    "attn.hook_q": ("head d_head", ONCE, "queries, bias included, before a norm and rotation"),
    "attn.hook_k": ("kv_head d_head", ONCE, "keys, bias included, before a norm and rotation"),
    "attn.hook_v": ("kv_head d_head", ONCE, "values, bias included"),
    "attn.hook_q_normed": ("head d_head", ONCE, "queries behind their norm, where there is one"),
    "attn.hook_k_normed": ("kv_head d_head", ONCE, "keys behind their norm, where there is one"),
    "attn.hook_rot_q": ("head d_head", ONCE, "rotated queries"),
    "attn.hook_rot_k": ("kv_head d_head", ONCE, "rotated keys"),
    "attn.hook_attn_scores": ("", ONCE, "q·k / sqrt(d_head), scaled and soft-capped as configured; -inf where masked"),
    "attn.hook_pattern": ("", ONCE, "softmax of the scores; zero in rows of padding"),
    "attn.hook_z": ("head d_head", ONCE, "pattern times values, per head"),
    "attn.hook_result": ("head d_model", RESULT, "each head's own output, z W_O, before a post-norm"),
    "attn.hook_out": ("d_model", ONCE, "what the norm behind attention reads, where there is one"),
    **_norm("ln1_post", "behind attention, where there is one", "what attention adds to the stream"),
    "hook_attn_out": ("d_model", ONCE, "what attention adds to the stream"),
    "hook_resid_mid": ("d_model", ONCE, "stream between attention and MLP"),
    "hook_mlp_in": ("d_model", MLP_IN, "the MLP's own copy of the stream, before ln2"),
    **_norm("ln2", "before the MLP", "what the MLP reads"),
    "mlp.hook_pre": ("d_mlp", ONCE, "before the activation function"),
    "mlp.hook_pre_linear": ("d_mlp", ONCE, "the other factor of a gated MLP"),
    "mlp.hook_post": ("d_mlp", ONCE, "what the output matrix reads (gated: the product)"),
    "mlp.hook_out": ("d_model", ONCE, "what the norm behind the MLP reads, where there is one"),
    **_norm("ln2_post", "behind the MLP, where there is one", "what the MLP adds to the stream"),
    "hook_mlp_out": ("d_model", ONCE, "what the MLP adds to the stream"),
    "hook_deepstack": ("d_model", IMAGES, "image features that enter the stream here (DeepStack); zero for text"),
    "hook_resid_post": ("d_model", ONCE, "residual stream leaving the block"),
}
_TEXT = {
    "hook_embed": ("d_model", ONCE, "what enters block 0: token embeddings, image features in their places"),
    **{f"blocks.{{l}}.{suffix}": row for suffix, row in _BLOCK.items()},
    "ln_final.hook_scale": ("1", ONCE, "denominator of the final norm"),
    "ln_final.hook_normalized": ("d_model", ONCE, "normalised stream before the norm's weight"),
    "ln_final.hook_out": ("d_model", ONCE, "what the unembedding reads"),
}
_VISION = {
    "vision.hook_embed": ("d_model", ENCODES, "patch embeddings: what enters block 0, or `ln_pre` if there is one"),
    "vision.ln_pre.hook_scale": ("1", ENCODES, "denominator of the norm before block 0, if there is one"),
    "vision.ln_pre.hook_normalized": ("d_model", ENCODES, "normalised embeddings before the norm's weight and bias"),
    "vision.ln_pre.hook_out": ("d_model", ENCODES, "what enters block 0, if there is a norm before it"),
    **{
        f"vision.blocks.{{l}}.{suffix}": (
            axes.replace("kv_head", "head"),
            ENCODES if fires == ONCE else fires,
            what,
        )
        for suffix, (axes, fires, what) in _BLOCK.items()
    },
    "vision.ln_post.hook_scale": ("1", ENCODES, "denominator of the norm behind the last block, if there is one"),
    "vision.ln_post.hook_normalized": ("d_model", ENCODES, "normalised stream before the norm's weight and bias"),
    "vision.ln_post.hook_out": ("d_model", ENCODES, "what the projector reads, if there is a norm before it"),
}
_PROJECTOR = {
    "projector.hook_pre": (
        "image token d_projector",
        ENCODES,
        "before the activation function, if there is one; one row per token",
    ),
    "projector.hook_post": ("image token d_projector", ENCODES, "after the activation function, if there is one"),
    **{
        f"projector.deepstack.{{l}}.{suffix}": (f"image token {axis}", ENCODES, f"{what}, of DeepStack's projector")
        for suffix, axis, what in (
            ("ln.hook_scale", "1", "denominator of the norm"),
            ("ln.hook_normalized", "d_merged", "normalised tokens before the norm's weight and bias"),
            ("ln.hook_out", "d_merged", "normalised tokens"),
            ("hook_pre", "d_projector", "before the activation function"),
            ("hook_post", "d_projector", "after the activation function"),
        )
    },
    "hook_image_features": (
        "image_token d_model_text",
        IMAGES,
        "what the language model receives, all images in a row",
    ),
}


def hook_table(model: "HookedVLM") -> list[HookRow]:
    """A row for every hook point of `model`, those of all layers in one; in the order of the forward pass.

    Raises:
        KeyError: a hook point that is described nowhere.
    """
    vision = model.cfg.vision
    described = {
        **{name: _vision_row(name, *row) for name, row in _VISION.items()},
        **({} if vision is None else _projector_norm_rows(vision)),
        **{name: HookRow(name, tuple(axes.split()), *rest) for name, (axes, *rest) in _PROJECTOR.items()},
        **{name: _text_row(name, *row) for name, row in _TEXT.items()},
    }
    present = {without_layer(name) for name in model.hook_dict}
    if unknown := present - set(described):
        raise KeyError(f"hook points without a description in hook_catalogue.py: {sorted(unknown)}")
    return [row for name, row in described.items() if name in present]


def without_layer(name: str) -> str:
    """The name of a hook point with `{l}` for its layer, as rows of the table have it."""
    return re.sub(r"(blocks|deepstack)\.\d+\.", r"\1.{l}.", name)


def _text_row(name: str, axes: str, fires: str, what: str) -> HookRow:
    at = "batch pos" if axes else "batch head query key"
    if ".ln1." in name:
        fires = f"{ONCE}; with a head axis {ATTN_IN}; three times (q, k, v) {SPLIT}, with a head axis"
    return HookRow(name, (*at.split(), *axes.split()), fires, what)


def _vision_row(name: str, axes: str, fires: str, what: str) -> HookRow:
    at = "image patch" if axes else "image head query_patch key_patch"
    return HookRow(name, (*at.split(), *axes.split()), fires, what)


def _projector_norm_rows(vision: VisionConfig) -> dict[str, HookRow]:
    at, what = ("image patch", "patches") if vision.norm_of == "patches" else ("image token", "tokens")
    width = "d_model" if vision.norm_of == "patches" else "d_merged"
    rows = {
        "hook_scale": ("1", "denominator of the projector's norm"),
        "hook_normalized": (width, f"normalised {what} before the norm's weight and bias"),
        "hook_out": (width, f"normalised {what}"),
    }
    return {
        f"projector.ln.{own}": HookRow(f"projector.ln.{own}", (*at.split(), axis), ENCODES, text)
        for own, (axis, text) in rows.items()
    }
