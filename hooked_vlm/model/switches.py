"""Switches of optional hook points, which cost memory and time when they are on."""

from typing import TYPE_CHECKING

from hooked_vlm.errors import InputError

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


def set_use_attn_result(model: "HookedVLM", use: bool) -> None:
    """Compute every head's own output (`attn.hook_result`); costs [pos, head, d_model] memory a layer."""
    model.cfg = model.cfg.with_(use_attn_result=use)


def set_use_split_qkv_input(model: "HookedVLM", use: bool) -> None:
    """Give every head its own copies of the residual stream (`hook_q_input`, `hook_k_input`, `hook_v_input`).

    Raises:
        InputError: `use_attn_in` is on.
    """
    _check_exclusive(use and model.cfg.use_attn_in, "use_split_qkv_input", "use_attn_in")
    model.cfg = model.cfg.with_(use_split_qkv_input=use)


def set_use_attn_in(model: "HookedVLM", use: bool) -> None:
    """Give every head its own copy of the residual stream (`hook_attn_in`), from which queries, keys and values are
    made. With grouped queries the key-value heads read the copies of the first heads, as in TransformerLens.

    Raises:
        InputError: `use_split_qkv_input` is on.
    """
    _check_exclusive(use and model.cfg.use_split_qkv_input, "use_attn_in", "use_split_qkv_input")
    model.cfg = model.cfg.with_(use_attn_in=use)


def _check_exclusive(both: bool, wanted: str, other: str) -> None:
    if both:
        raise InputError(f"{wanted} and {other} exclude each other: call model.set_{other}(False) first")


def set_use_hook_mlp_in(model: "HookedVLM", use: bool) -> None:
    """Give the MLP its own copy of the residual stream (`hook_mlp_in`)."""
    model.cfg = model.cfg.with_(use_hook_mlp_in=use)
