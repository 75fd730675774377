"""Options of a command in messages of the library, which name arguments of Python."""

import re
from dataclasses import fields, is_dataclass
from typing import Any

CALL = re.compile(r"(\w\([^()]*\))")
"""A call of Python in a message: its arguments stay Python's."""


def option_names(config: Any) -> set[str]:
    """Fields of a command's settings, those of nested settings included."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return set(values).union(*(option_names(value) for value in values.values() if is_dataclass(value)))


def with_flags(message: str, config: Any) -> str:
    """Put the command's options in the place of arguments: --max-pixels of `max_pixels`, --dtype of `dtype=`.

    A name of one word may be a word of English: it is an argument only with `=` behind it. Paths, quoted text and calls
    are left as they are.
    """
    names = "|".join(sorted(option_names(config), key=len, reverse=True))
    argument = re.compile(rf"(?<![\w./\\'\"-])({names})(?:=(None\b|\.\.\.|torch\.)?|\b(?![/'\"]|\.\w))")
    parts = CALL.split(message)
    return "".join(part if i % 2 else argument.sub(_as_option, part) for i, part in enumerate(parts))


def _as_option(found: re.Match[str]) -> str:
    name, value = found.groups()
    option = "--" + name.replace("_", "-")
    if found[0] == name:
        return option if "_" in name else name
    if value == "None":
        return f"no {option}"
    follows = found.string[found.end() : found.end() + 1]
    return f"{option} " if value != "..." and (follows.isalnum() or follows in ("'", '"', "-")) else option
