"""Tiny models whose layers differ in window and rotary positions, with tokens that see each other both ways."""

from typing import Any

from families import own_copy, tiny_model

from hooked_vlm.config import LayerKind, RopeScaling

NEAR, FAR = LayerKind(3, 1e4), LayerKind(None, 1e6, RopeScaling("linear", 8.0))
OF_KINDS = {
    "layer_kinds": (NEAR, FAR),
    "layer_kind_of": (0, 1, 0),
    "rope_theta": 1e6,
    "sliding_window": None,
    "rope_scaling": None,
    "bidirectional": None,
    "window_cuts_blocks": True,
}
BOTH_WAYS: dict[str, dict[str, Any]] = {
    "causal": OF_KINDS,
    "image, cut": {**OF_KINDS, "bidirectional": "image"},
    "image, whole": {**OF_KINDS, "bidirectional": "image", "window_cuts_blocks": False},
    "prompt, cut": {**OF_KINDS, "bidirectional": "prompt"},
    "prompt, whole": {**OF_KINDS, "bidirectional": "prompt", "window_cuts_blocks": False},
}


def with_kinds(family: str, both_ways: str, **changes: Any) -> Any:
    """A family's tiny model, with a configuration of its own."""
    model = own_copy(tiny_model(family))
    model.cfg = model.cfg.with_(**{**BOTH_WAYS[both_ways], **changes})
    return model
