"""Hook points whose activations can be stored row by row, with the kind and shape of their rows."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Literal

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import HookError
from hooked_vlm.model.hook_catalogue import hook_table
from hooked_vlm.nn.hooks import is_quadratic, is_vision

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Kind = Literal["tokens", "patches", "image_tokens"]
"""Rows of the language model, of the vision tower, and of the projector and its output."""
NamesFilter = str | list[str] | tuple[str, ...] | Callable[[str], bool]
"""Hook names, names with wildcards ("blocks.*.hook_resid_post"), or a predicate."""


def kind_of(name: str, cfg: VLMConfig) -> Kind:
    """The kind of rows of a hook point's activations."""
    if not is_vision(name):
        return "tokens"
    of_patches = name.startswith("vision.") or (
        name.startswith("projector.ln.") and cfg.vision is not None and cfg.vision.norm_of == "patches"
    )
    return "patches" if of_patches else "image_tokens"


def resolve_names(model: "HookedVLM", names_filter: NamesFilter) -> list[str]:
    """The selected hook points, in the order of `model.hook_dict`; of wildcards and predicates those that can
    be kept.

    Raises:
        HookError: nothing is meant, or a name that is unknown, switched off, or without rows of one width.
    """
    asked = list(names_filter) if isinstance(names_filter, list | tuple) else [names_filter]
    wanted: set[str] = set()
    for one in asked:
        if isinstance(one, str) and not set(one) & set("*?["):
            model.check_hook_name(one)
            if why := _why_not(model, one):
                raise HookError(f"{one!r} cannot be kept: {why}")
            wanted.add(one)
            continue
        matches = partial(_matches, one) if isinstance(one, str) else one
        found = [name for name in model.hook_dict if matches(name) and not _why_not(model, name)]
        if not found:
            shown = repr(one) if isinstance(one, str) else "this filter"
            raise HookError(f"{shown} matches no hook point that fires and has rows of one width (see docs/hooks.md)")
        wanted.update(found)
    if not wanted:
        raise HookError("no hook points are asked for")
    return [name for name in model.hook_dict if name in wanted]


def row_shapes(model: "HookedVLM", names: list[str]) -> dict[str, tuple[int, ...]]:
    """The shape of one row of each hook point."""
    axes = {row.name: row.shape for row in hook_table(model)}
    return {name: _row_shape(axes[_in_table(name)], name, model.cfg) for name in names}


def _row_shape(axes: tuple[str, ...], name: str, cfg: VLMConfig) -> tuple[int, ...]:
    own = cfg.vision if is_vision(name) and cfg.vision is not None else cfg
    sizes = {
        "1": 1,
        "head": own.n_heads,
        "kv_head": cfg.n_key_value_heads,
        "d_head": own.d_head,
        "d_model": own.d_model,
        "d_mlp": own.d_mlp,
        "d_model_text": cfg.d_model,
    }
    if cfg.vision is not None:
        merged = cfg.vision.d_merged
        sizes |= {"d_merged": merged, "d_projector": cfg.vision.d_projector or merged}
    places = {"batch", "pos", "image", "patch", "token", "image_token"}
    return tuple(sizes[axis] for axis in axes if axis not in places)


def _in_table(name: str) -> str:
    return ".".join("{l}" if part.isdigit() else part for part in name.split("."))


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern)


def _why_not(model: "HookedVLM", name: str) -> str:
    if is_quadratic(name):
        return "it has a [pos, pos] plane and no rows of one width; keep queries and keys instead"
    if model.cfg.use_split_qkv_input and ".ln1." in name and not is_vision(name):
        return "with use_split_qkv_input it fires three times"
    if name.startswith("projector.") and model.cfg.vision is not None and model.cfg.vision.line_break:
        return "the projector's outputs are arranged with line breaks before they are tokens; keep hook_image_features"
    try:
        model.check_hook_name(name)
    except HookError as error:
        return str(error)
    return ""
