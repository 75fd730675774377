"""Activations as one file of tensors: theirs, and what it takes to derive patterns from them."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.model.deriving import Derivation, own_tensors
from hooked_vlm.nn.masks import AttentionMask
from hooked_vlm.nn.scores import Scoring
from hooked_vlm.runtime.files import atomic_write, why

FILE = "cache.safetensors"
_MASK = "{side}.mask.{field}"
"""Names of a mask's tensors in the file; no hook point is called so."""
_TENSORS = ("key_valid", "uncached_left_padding", "blocks")


def save(
    folder: Path, activations: dict[str, Tensor], text: Derivation, vision: Derivation, facts: dict[str, bool]
) -> None:
    """Write activations by their full names.

    Raises:
        OutputError: the file cannot be written; nothing is left of it.
    """
    stored: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    same = {}
    for name, x in own_tensors(activations).items():
        same[name] = names.setdefault(id(x), name)
        stored[same[name]] = x
    header: dict[str, Any] = {**facts, "same": same}
    for side, derivation in (("text", text), ("vision", vision)):
        plain = asdict(replace(derivation, masks=()))
        rules = [_rule(mask) for mask in derivation.masks]
        header[side] = {**plain, "exchanged": sorted(derivation.exchanged), "masks": rules}
        for mask in derivation.masks:  # kinds of layers share tensors, or have none
            for field in _TENSORS:
                if (x := getattr(mask, field)) is not None:
                    stored[_MASK.format(side=side, field=field)] = x.contiguous()
    atomic_write(folder / FILE, lambda aside: save_file(stored, aside, {"cache": json.dumps(header)}))


def load(folder: Path, device: torch.device | str) -> tuple[dict[str, Tensor], Derivation, Derivation, dict[str, bool]]:
    """Read what `save` wrote: activations, both sides' derivations, and the facts.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"there is no saved cache in {folder}: {FILE} is missing")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            header = json.loads(file.metadata()["cache"])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        activations = {str(name): stored[of] for name, of in header["same"].items()}
        text, vision = (_derivation(side, header[side], stored) for side in ("text", "vision"))
        facts = {name: bool(header[name]) for name in ("has_batch_dim", "cut")}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged, or no saved cache: {why(error)}") from error
    return activations, text, vision, facts


def _rule(mask: AttentionMask) -> dict[str, Any]:
    rule = {name: getattr(mask, name) for name in ("causal", "window", "window_cuts_blocks")}
    return {**rule, "tensors": [field for field in _TENSORS if getattr(mask, field) is not None]}


def _derivation(side: str, facts: dict[str, Any], stored: dict[str, Tensor]) -> Derivation:
    facts = dict(facts)
    if "mask" in facts:  # files of version 0.1 have one for all layers
        rule = facts.pop("mask")
        present = [field for field in _TENSORS if _MASK.format(side=side, field=field) in stored]
        facts["masks"] = [] if rule is None else [{**rule, "tensors": present}]
    masks = []
    for rule in facts["masks"]:
        tensors: dict[str, Any] = {field: stored[_MASK.format(side=side, field=field)] for field in rule.pop("tensors")}
        masks.append(AttentionMask(**rule, **tensors))
    plain = {
        "exchanged": frozenset(facts["exchanged"]),
        "masks": tuple(masks),
        "kind_of": tuple(facts.get("kind_of", ())),
        "scoring": Scoring(**facts.get("scoring", {})),
    }
    return Derivation(**{**facts, **plain})
