"""What sets a family apart, taken away: each flag moves the numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import KINDS, tiny_model

from hooked_vlm import HookedVLM
from hooked_vlm.config import LayerKind, RopeScaling

FULL, WINDOW = LayerKind(None, 1e6, RopeScaling("linear", 8.0)), LayerKind(8, 1e4)
"""Of Gemma 3's layers."""
GEMMA2 = LayerKind(None, 1e4)
# family: what it has, and the case of its parity tests that shows it
FLAGS: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "qwen2.5-vl": {
        "windows": ({"window": None, "full_layers": ()}, "windows"),
        "a block that sees whole pictures": ({"full_layers": ()}, "windows"),
        "the side of windows": ({"window": 8}, "windows"),
        "time of videos": ({"positions_per_second": None}, "long-video"),
        "activation of the tower": ({"act_fn": "gelu"}, "one-image"),
    },
    "llava-next": {
        "line breaks": ({"line_break": False}, "one-image"),
        "class token": ({"class_token": False, "n_positions": 9}, "one-image"),
        "norm before the first block": ({"pre_norm": False}, "one-image"),
        "blocks that are read": ({"n_layers_used": None}, "one-image"),
    },
    "llava-onevision": {
        "line breaks": ({"line_break": False}, "video"),
        "bias of the patch embedding": ({"patch_bias": False}, "one-image"),
        "activation of the tower": ({"act_fn": "quick_gelu"}, "one-image"),
    },
    "qwen3-vl": {
        "norms of queries and keys": ({"qk_norm": False}, "one-image"),
        "axes that take turns": ({"mrope_interleaved": False}, "one-image"),
        "three axes of positions": ({"mrope_section": None, "mrope_interleaved": False}, "one-image"),
        "DeepStack": ({"deepstack_layers": ()}, "one-image"),
        "DeepStack's second block": ({"deepstack_layers": (0,)}, "one-image"),
        "the blocks that DeepStack reads": ({"deepstack_layers": (0, 2)}, "one-image"),
        "learned positions": ({"n_positions": 0}, "one-image"),
        "how they fit the picture": ({"position_fit": "bicubic"}, "one-image"),
        "rotary positions of the tower": ({"rope_theta": None}, "one-image"),
        "bias of the patches": ({"patch_bias": False}, "one-image"),
        "activation of the tower": ({"act_fn": "gelu"}, "as the table"),
    },
    "idefics3": {
        "learned positions": ({"n_positions": 0}, "one-image"),
        "bias of the patch embedding": ({"patch_bias": False}, "one-image"),
        "norm behind the last block": ({"post_norm": False}, "one-image"),
        "activation of the tower": ({"act_fn": "gelu"}, "one-image"),
        "the order of patches in a token": ({"transposed_tokens": True}, "one-image"),
    },
    "gemma3": {
        "norms that multiply by 1 + weight": ({"rmsnorm_uses_offset": False}, "one-image"),
        "norms behind attention and MLP": ({"use_normalization_before_and_after": False}, "one-image"),
        "norms of queries and keys": ({"qk_norm": False}, "one-image"),
        "scale of scores": ({"attn_scale": None}, "one-image"),
        "scale of embeddings": ({"embed_scale": None}, "one-image"),
        "windows": ({"layer_kinds": (FULL, replace(WINDOW, window=None))}, "text"),
        "frequencies of layers with windows": ({"layer_kinds": (FULL, replace(WINDOW, rope_theta=1e6))}, "text"),
        "scaling of the others'": ({"layer_kinds": (replace(FULL, rope_scaling=None), WINDOW)}, "text"),
        "which layers have windows": ({"layer_kind_of": (0, 1, 1)}, "text"),
        "tokens of a picture see each other": ({"bidirectional": None}, "one-image"),
        "of pictures alone": ({"bidirectional": "prompt"}, "text"),
        "windows cut pictures": ({"window_cuts_blocks": False}, "one-image"),
        "norm behind the last block": ({"post_norm": False}, "one-image"),
        "norm of the projector": ({"projector": ("pool", "linear")}, "one-image"),
        "it multiplies by 1 + weight": ({"projector_norm_offset": False}, "one-image"),
        "activation of the tower": ({"act_fn": "quick_gelu"}, "one-image"),
    },
    "paligemma": {
        "norms that multiply by 1 + weight": ({"rmsnorm_uses_offset": False}, "one-image"),
        "scale of embeddings": ({"embed_scale": None}, "one-image"),
        "tokens of a prompt see each other": ({"bidirectional": None}, "text"),
        "text, too": ({"bidirectional": "image"}, "one-image"),
        "norm behind the last block": ({"post_norm": False}, "one-image"),
        "bias of the projector": ({"projector_bias": False}, "one-image"),
    },
    "paligemma2": {
        "cap of scores": ({"attn_scores_soft_cap": None}, "one-image"),
        "cap of logits": ({"output_logits_soft_cap": None}, "one-image"),
        "norms behind attention and MLP": ({"use_normalization_before_and_after": False}, "one-image"),
        "scale of scores": ({"attn_scale": None}, "one-image"),
        "tokens of a prompt see each other": ({"bidirectional": None}, "text"),
        "windows cut no prompt": ({"window_cuts_blocks": True}, "one-image"),
        "windows": ({"layer_kinds": (GEMMA2, GEMMA2)}, "suffix"),
    },
    "internvl3.5": {"norms of queries and keys": ({"qk_norm": False}, "one-image")},
}
OF_TEXT = (
    "qk_norm", "mrope_interleaved", "mrope_section", "rmsnorm_uses_offset", "use_normalization_before_and_after",
    "attn_scale", "attn_scores_soft_cap", "output_logits_soft_cap", "embed_scale", "layer_kinds", "layer_kind_of",
    "bidirectional", "window_cuts_blocks",
)  # fmt: skip
MOVES = 1e-4
"""Thirty times what the parity tests find between these models and their references."""
CASES = [(family, flag) for family, flags in FLAGS.items() for flag in flags]


@pytest.mark.parametrize(("family", "flag"), CASES, ids=[f"{family}-{flag}" for family, flag in CASES])
@torch.no_grad()
def test_a_flag_taken_away_moves_the_logits(family: str, flag: str) -> None:
    changes, case = FLAGS[family][flag]
    model, kind = tiny_model(family), KINDS[family]
    batch = kind.batch(kind.cases[case])
    of_text = {name: value for name, value in changes.items() if name in OF_TEXT}
    of_tower = {name: value for name, value in changes.items() if name not in OF_TEXT}
    other = HookedVLM(model.cfg.with_(vision=replace(model.cfg.vision, **of_tower), **of_text))
    kept = other.state_dict().keys()
    own = {name: tensor for name, tensor in model.state_dict().items() if name in kept}
    if "class_token" in changes:  # it has the first of the positions
        own["vision.tile_embed.positions"] = own["vision.tile_embed.positions"][:, 1:]
    other.load_state_dict(own)
    moved = (other(other.inputs_from_hf(batch)) - model(model.inputs_from_hf(batch))).abs().max()
    assert moved > MOVES, moved
