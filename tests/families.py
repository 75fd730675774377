"""Tiny and bundled models of every family, with inputs of the same kinds: the laws of the tests run over them.

A new family adds an entry to `KINDS` and its name to family_names.py.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import pytest
import tiny_anyres
import tiny_gemma3
import tiny_idefics3
import tiny_internvl
import tiny_llava
import tiny_made_up
import tiny_paligemma
import tiny_qwen2_5_vl
import tiny_qwen2_vl
import tiny_qwen3_vl
import torch
from family_names import ONE_OF_EACH_KIND, OTHERS

from hooked_vlm import HookedVLM
from hooked_vlm.inputs.token_layout import Grid

Batch = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Kind:
    """A tiny model of a family, its reference, and inputs for both."""

    hf: Callable[[], Any]
    """The model of `transformers`, with random weights and attention written out. Shared."""
    batch: Callable[..., Batch]
    """Rows of token ids and pictures, and a seed for the pixels, to what a Hugging Face processor returns."""
    for_hf: Callable[[Batch], Batch]
    """What the reference's `forward` takes of a batch."""
    images: dict[str, Any]
    """What stands for the "small" and the "large" image of a row."""
    cases: dict[str, list[list[Any]]]
    """Batches of the parity tests: "one-image", "images-of-two-sizes", "text", "left-padded" and the family's own."""
    vision: dict[str, str]
    """Hook points of the image side: module of the reference whose output (or attention) they show, `{l}`: layer."""
    placeholders: tuple[int, ...]
    """Tokens that the loss leaves out."""
    mixed: bool = True
    """Whether rows of a batch are in the reference what they are alone."""
    in_order: Callable[[str, torch.Tensor, tuple[Grid, ...]], torch.Tensor] = lambda name, x, grids: x
    """What the reference's module shows at a hook point, in the order of the pictures' patches or tokens."""
    n_new: int = 12
    """Number of tokens that the reference generates as without a cache."""


QWEN2_VL = {
    "vision.blocks.0.hook_resid_pre": "model.visual.patch_embed",
    "vision.blocks.{l}.hook_resid_post": "model.visual.blocks.{l}",
    "hook_image_features": "model.visual.merger",
}
QWEN3_VL = {
    "vision.blocks.{l}.hook_attn_out": "model.visual.blocks.{l}.attn",
    "vision.blocks.{l}.hook_mlp_out": "model.visual.blocks.{l}.mlp",
    "vision.blocks.{l}.hook_resid_post": "model.visual.blocks.{l}",
    "hook_image_features": "model.visual.merger",
    "blocks.{l}.hook_deepstack": "model.visual.deepstack_merger_list.{l}",
}
INTERNVL = {
    "vision.blocks.0.hook_resid_pre": "model.vision_tower.embeddings",
    "vision.blocks.{l}.hook_resid_post": "model.vision_tower.encoder.layer.{l}",
    "vision.blocks.{l}.attn.hook_pattern": "model.vision_tower.encoder.layer.{l}.attention",
    "hook_image_features": "model.multi_modal_projector",
}
CLIP = {
    "vision.blocks.0.hook_resid_pre": "model.vision_tower.pre_layrnorm",
    "vision.blocks.{l}.hook_resid_post": "model.vision_tower.encoder.layers.{l}",
    "vision.blocks.{l}.attn.hook_pattern": "model.vision_tower.encoder.layers.{l}.self_attn",
}
LLAVA = {**CLIP, "hook_image_features": "model.multi_modal_projector"}
NEXT = {**CLIP, "hook_image_features": "model.packed"}
IDEFICS3 = {
    "vision.blocks.0.hook_resid_pre": "model.vision_model.embeddings",
    "vision.blocks.{l}.hook_resid_post": "model.vision_model.encoder.layers.{l}",
    "vision.blocks.{l}.attn.hook_pattern": "model.vision_model.encoder.layers.{l}.self_attn",
    "hook_image_features": "model.connector",
}
ONEVISION = {**NEXT, "vision.blocks.0.hook_resid_pre": "model.vision_tower.embeddings"}
SIGLIP = {**LLAVA, "vision.blocks.0.hook_resid_pre": "model.vision_tower.embeddings"}


MADE_UP = {
    "vision.blocks.0.hook_resid_pre": "model.vision_tower.embeddings",
    "vision.blocks.{l}.hook_resid_post": "model.vision_tower.encoder.layers.{l}",
    "hook_image_features": "model.multi_modal_projector",
}


def qwen2_vl(tied: bool) -> Kind:
    return Kind(
        hf=partial(tiny_qwen2_vl.tiny_hf, tied),
        batch=tiny_qwen2_vl.hf_batch,
        for_hf=tiny_qwen2_vl.for_hf,
        images={"small": ("image", (1, 4, 4)), "large": ("image", (1, 4, 6))},
        cases=tiny_qwen2_vl.CASES,
        vision=QWEN2_VL,
        placeholders=(tiny_qwen2_vl.IMAGE, tiny_qwen2_vl.VIDEO),
    )


def qwen2_5_vl(tied: bool) -> Kind:
    return replace(
        qwen2_vl(tied),
        hf=partial(tiny_qwen2_5_vl.tiny_hf, tied),
        batch=tiny_qwen2_5_vl.hf_batch,
        for_hf=tiny_qwen2_5_vl.for_hf,
        cases=tiny_qwen2_5_vl.CASES,
        in_order=tiny_qwen2_5_vl.in_order,
    )


def qwen3_vl(tied: bool) -> Kind:
    return replace(
        qwen2_vl(tied),
        hf=partial(tiny_qwen3_vl.tiny_hf, tied),
        batch=tiny_qwen3_vl.hf_batch,
        for_hf=tiny_qwen3_vl.for_hf,
        cases=tiny_qwen3_vl.CASES,
        vision=QWEN3_VL,
    )


def internvl(text: str, **differs: Any) -> Kind:
    return Kind(
        hf=partial(tiny_internvl.tiny_hf, text),
        batch=tiny_internvl.hf_batch,
        for_hf=tiny_internvl.for_hf,
        images={"small": ("image", 1), "large": ("image", 2)},
        cases=tiny_internvl.CASES,
        vision=INTERNVL,
        placeholders=(tiny_internvl.IMAGE,),
        **{"n_new": 40, **differs},
    )


def llava() -> Kind:
    return Kind(
        hf=tiny_llava.tiny_llava,
        batch=tiny_llava.llava_batch,
        for_hf=tiny_llava.for_hf,
        images={"small": "image", "large": "image"},
        cases=tiny_llava.LLAVA_CASES,
        vision=LLAVA,
        placeholders=(tiny_llava.IMAGE,),
        n_new=40,
    )


def llava_next() -> Kind:
    return Kind(
        hf=tiny_anyres.tiny_next,
        batch=tiny_anyres.next_batch,
        for_hf=tiny_anyres.for_hf,
        images={"small": ("image", tiny_anyres.SMALL), "large": ("image", tiny_anyres.WIDE)},
        cases=tiny_anyres.NEXT_CASES,
        vision=NEXT,
        placeholders=(tiny_anyres.IMAGE,),
    )


def onevision(tied: bool) -> Kind:
    return replace(
        llava_next(),
        hf=partial(tiny_anyres.tiny_onevision, tied),
        batch=tiny_anyres.onevision_batch,
        images={"small": ("image", tiny_anyres.SMALL), "large": ("image", tiny_anyres.LARGE)},
        cases=tiny_anyres.ONEVISION_CASES,
        vision=ONEVISION,
        placeholders=(tiny_anyres.IMAGE, tiny_anyres.VIDEO),
    )


def idefics3(name: str, tied: bool) -> Kind:
    return Kind(
        hf=partial(tiny_idefics3.tiny_hf, name, tied),
        batch=tiny_idefics3.hf_batch,
        for_hf=tiny_idefics3.for_hf,
        images={"small": ("image", tiny_idefics3.SMALL), "large": ("image", tiny_idefics3.LARGE)},
        cases=tiny_idefics3.CASES,
        vision=IDEFICS3,
        placeholders=(tiny_idefics3.IMAGE,),
    )


def gemma3(tied: bool) -> Kind:
    return Kind(
        hf=partial(tiny_gemma3.tiny_hf, tied),
        batch=tiny_gemma3.gemma3_batch,
        for_hf=tiny_gemma3.for_hf,
        images={"small": "image", "large": "image"},
        cases=tiny_gemma3.CASES,
        vision=SIGLIP,
        placeholders=(tiny_gemma3.IMAGE,),
    )


def paligemma(text: str, tied: bool, n_key_value_heads: int = 2) -> Kind:
    return Kind(
        hf=partial(tiny_paligemma.tiny_hf, text, tied, n_key_value_heads),
        batch=tiny_paligemma.paligemma_batch,
        for_hf=tiny_paligemma.for_hf,
        images={"small": "image", "large": "image"},
        cases=tiny_paligemma.CASES,
        vision=SIGLIP,
        placeholders=(tiny_paligemma.IMAGE,),
    )


def made_up() -> Kind:
    return Kind(
        hf=tiny_made_up.tiny_hf,
        batch=tiny_made_up.hf_batch,
        for_hf=tiny_internvl.for_hf,
        images={"small": ("image", 1), "large": ("image", 2)},
        cases=tiny_made_up.CASES,
        vision=MADE_UP,
        placeholders=(tiny_made_up.IMAGE,),
    )


# The first of a family bears its name; the others differ in the language model, the tower or the unembedding.
KINDS = {
    "qwen2-vl": qwen2_vl(tied=False),
    "qwen2-vl, tied": qwen2_vl(tied=True),
    "qwen2.5-vl": qwen2_5_vl(tied=False),
    "qwen2.5-vl, tied": qwen2_5_vl(tied=True),
    "qwen3-vl": qwen3_vl(tied=False),
    "qwen3-vl, tied": qwen3_vl(tied=True),
    "internvl2": internvl("qwen2"),
    "internvl3.5": internvl("qwen3"),
    "internvl2, llama, large tower": internvl("llama"),
    "internvl2, dynamic": internvl("llama-dynamic"),
    # Longrope changes the frequencies of a row beyond its trained length: the reference does so for the whole batch,
    # and generates anew without its cache there (docs/references.md)
    "internvl2, phi3": internvl("phi3", mixed=False, n_new=6),
    "llava": llava(),
    "llava-next": llava_next(),
    "llava-onevision": onevision(tied=False),
    "llava-onevision, tied": onevision(tied=True),
    "idefics3": idefics3("idefics3", tied=False),
    "smolvlm, tied": idefics3("smolvlm", tied=True),
    "gemma3": gemma3(tied=False),
    "gemma3, tied": gemma3(tied=True),
    "paligemma": paligemma("gemma", tied=False),
    "paligemma, tied": paligemma("gemma", tied=True),
    "paligemma, one key-value head": paligemma("gemma", tied=False, n_key_value_heads=1),
    "paligemma2": paligemma("gemma2", tied=False),
    "paligemma2, tied": paligemma("gemma2", tied=True),
    "made-up": made_up(),
}
FAMILIES = (*ONE_OF_EACH_KIND, *OTHERS)


def plain_first(names: Iterable[str], template: str = "{}") -> list[Any]:
    """Parameters for families or kinds: one family of each kind in a plain run, the others with --full."""
    return [
        pytest.param(template.format(name), marks=() if name in ONE_OF_EACH_KIND else pytest.mark.full)
        for name in names
    ]


# name: (row of every family; a word stands for an image, of two sizes)
ROWS: dict[str, list[list[Any]]] = {
    "one image": [[5, 6, "small", 7, 8, 9, 10]],
    "two images": [[5, "small", 7, "large", 8, 9]],
    "padded": [[5, 6, "small", 7, 8], [11, 12, 13], [5, "large", "small", 9]],
}


@lru_cache
def tiny_model(kind: str) -> Any:
    """Ours, on the reference's storage. Shared: weights must not be changed, hooks not left."""
    return HookedVLM.from_hf(KINDS[kind].hf())


def inputs_of(kind: str, rows: list[list[Any]], seed: int = 0) -> Any:
    """Rows as in `ROWS` for a tiny model, about pictures of this seed."""
    filled = [[KINDS[kind].images.get(item, item) for item in row] for row in rows]
    return tiny_model(kind).inputs_from_hf(KINDS[kind].batch(filled, seed))


def model_and_inputs(family: str, rows: str) -> tuple[Any, Any]:
    """A family's tiny model, which is shared, and inputs of its own."""
    return tiny_model(family), inputs_of(family, ROWS[rows])


ONE_TOY = ("toy-qwen2-vl", pytest.param("toy-internvl2", marks=pytest.mark.full))
"""The bundled models for costly laws: the second one with --full."""


@lru_cache
def bundled(name: str) -> HookedVLM:
    """A bundled model on the CPU. Shared: weights must not be changed, hooks not left."""
    return HookedVLM.from_pretrained(name, device="cpu")


def own_copy(model: Any) -> Any:
    """The same weights in a model of a test's own, whose modules and switches it may change."""
    return copy.deepcopy(model)
