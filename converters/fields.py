"""Typed access to the fields of a `config.json`, with errors that name the field."""

from collections.abc import Mapping
from typing import Any

import torch

from hooked_vlm.errors import CheckpointError

LARGEST = 2**31 - 1
REQUIRED: Any = object()
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


class Fields:
    """The fields of one section; each is read from the first of `sources` that has a value for it.

    A null counts as absent, as it does in transformers. `where` is the section's name in error messages. Methods
    raise `CheckpointError` on a value of the wrong kind.
    """

    def __init__(self, *sources: Mapping[str, Any], where: str = "config.json") -> None:
        self.sources = sources
        self.where = where

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value."""
        return next((source[name] for source in self.sources if source.get(name) is not None), default)

    def states(self, name: str) -> bool:
        """Whether the key is present, even if null."""
        return any(name in source for source in self.sources)

    def nulled(self, name: str) -> bool:
        """Whether the key is present with a null, where a later source may have a value."""
        return next((source[name] is None for source in self.sources if name in source), False)

    def section(self, name: str) -> Mapping[str, Any]:
        """A nested object; empty where absent."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self.error(name, "an object", value)
        return value

    def size(self, name: str, default: Any = REQUIRED, most: int = LARGEST) -> int:
        """A positive whole number; a list of equal ones counts as that number (`patch_size: [14, 14]`)."""
        value = self.get(name, default)
        item: Any = value
        if isinstance(value, list | tuple) and value and all(other == value[0] for other in value):
            item = value[0]
        if isinstance(item, float) and item.is_integer():
            item = int(item)
        if not _is_int(item) or not 1 <= item <= most:
            raise self.error(name, f"a whole number from 1 to {most}", value)
        return int(item)

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """A positive number below 1e18."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
            raise self.error(name, "a positive number", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false", value)
        return value

    def text(self, name: str) -> str | None:
        """A string, or None where absent."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self.error(name, "a text", value)
        return value

    def one_of(self, name: str, values: tuple[str, ...], default: str) -> str:
        """A string among `values`."""
        value = self.get(name, default)
        if value not in values:
            raise self.error(name, " or ".join(map(repr, values)) + " (others are not supported)", value)
        return value

    def token_id(self, name: str, default: int | None = None) -> int | None:
        """The id of one token."""
        ids = self.token_ids(name, () if default is None else (default,))
        if len(ids) > 1:
            raise self.error(name, "one token id", list(ids))
        return ids[0] if ids else None

    def token_ids(self, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The ids in a field that may hold one or a list."""
        value = self.get(name, list(default))
        ids = value if isinstance(value, list | tuple) else [value]
        if not all(_is_int(item) and 0 <= item <= LARGEST for item in ids):
            raise self.error(name, "a token id (zero or more) or a list of them", value)
        return tuple(ids)

    def divided(self, name: str, by: str, value: int, parts: int) -> int:
        """`value / parts`, which must be whole (the width of one head, for example)."""
        if value % parts:
            raise CheckpointError(f"{self.where}: {name} ({value}) must be a multiple of {by} ({parts})")
        return value // parts

    def error(self, name: str, expected: str, value: Any) -> CheckpointError:
        """The error for a field that is absent or has a value of the wrong kind."""
        if value is REQUIRED:
            return CheckpointError(f"{self.where}: {name} is missing; expected {expected}")
        return CheckpointError(f"{self.where}: {name} must be {expected}, got {_short(value)}")


def read_dtype(fields: Fields) -> torch.dtype | None:
    """The dtype stated in a configuration (`dtype` since transformers 5, `torch_dtype` before), or None."""
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name)
    if value is None or value == "auto":
        return None
    dtype = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
    if dtype is None:
        raise fields.error(name, "one of " + ", ".join(DTYPES), value)
    return dtype


def stated_dtype(hf_config: Mapping[str, Any], section: str | None = None) -> torch.dtype | None:
    """The dtype stated at the root of a configuration, or else in a section, or None (then the tensors' own is used).

    Raises:
        CheckpointError: it names no floating-point dtype.
    """
    root = Fields(hf_config)
    stated = read_dtype(root)
    return stated if stated is not None or section is None else read_dtype(Fields(root.section(section), where=section))


def stored_in(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """A configuration that states this dtype (none for None), without references to remote code."""
    left_out = ("auto_map", "_commit_hash", "dtype", "torch_dtype")
    kept = {name: value for name, value in config.items() if name not in left_out}
    return kept if dtype is None else {**kept, "torch_dtype": str(dtype).removeprefix("torch.")}


QUANTISATION_KEYS = ("quantization_config", "compression_config")
SECTIONS = ("text_config", "llm_config", "vision_config")


def refuse_quantised(root: Fields) -> None:
    """Refuse a configuration that states, at its root or in the section of a part, that weights are quantised.

    Raises:
        CheckpointError: the key and the method that it names.
    """
    named = [(root.where, root), *((name, Fields(root.section(name), where=name)) for name in SECTIONS)]
    for where, fields in named:
        for key in QUANTISATION_KEYS:
            if (stated := fields.get(key)) is None:
                continue
            method = stated.get("quant_method") if isinstance(stated, Mapping) else None
            raise CheckpointError(
                f"{where} has a {key}{f' ({_short(method)})' if method else ''}: quantised checkpoints are not "
                "supported; load the unquantised one, with quantize= to round it here"
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else text[:most] + " ..."
