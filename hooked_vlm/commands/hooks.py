"""`hooked-vlm hooks MODEL`: the hook points of one model, with its numbers, from config.json alone."""

import re
import textwrap
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hooked_vlm.analysis.text_tables import WIDTH, text_table
from hooked_vlm.commands.config import HooksConfig
from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import InputError
from hooked_vlm.model.hook_catalogue import HookRow, hook_table
from hooked_vlm.model.hook_shapes import filled
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.nn.hooks import is_vision

Tower = Literal["language", "vision", "projector"]


@dataclass(frozen=True)
class HookLine:
    """One hook point, or the same one of every layer."""

    name: str
    """With `{l}` for the layer, unless it is one layer's own."""
    tower: Tower
    shape: tuple[int | str, ...]
    """A number wherever the model decides it; the names of the other axes."""
    n_layers: int
    """How many layers have it; 1 where it belongs to no layer."""
    fires: str
    what: str


def hook_lines(config: HooksConfig) -> list[HookLine]:
    """The hook points asked for, in the order of docs/hooks.md.

    Raises:
        CheckpointError: there is no such model.
        InputError: `grep` is no regular expression, or nothing is left.
    """
    model = HookedVLM.without_weights(config.model)
    try:
        pattern = re.compile(config.grep or "", re.IGNORECASE)
    except re.error as error:
        raise InputError(f"--grep takes a regular expression, got {config.grep!r} ({error})") from error
    lines = [_line(row, model.cfg) for row in hook_table(model)]
    if config.layers:
        lines = [one for line in lines for one in _by_layer(line)]
    lines = [line for line in lines if config.tower in ("all", line.tower)]
    found = [line for line in lines if pattern.search(line.name) or pattern.search(line.what)]
    if not found:
        of = f" with {config.grep!r} in name or description" if lines else ""
        where = "" if config.tower == "all" else f" of the {config.tower} side"
        raise InputError(f"{config.model} has no hook point{where}{of}")
    return found


def answer(config: HooksConfig) -> tuple[str, list[dict[str, Any]]]:
    """Return the output of `hooked-vlm hooks` as text and as data."""
    lines = hook_lines(config)
    return _text(lines), [asdict(line) for line in lines]


def _text(lines: list[HookLine]) -> str:
    """Names and shapes in columns; under each what it is, in how many layers, and when it fires."""
    named = text_table(("name", "shape"), [(line.name, _shape(line.shape)) for line in lines], left=2).splitlines()
    return "\n".join(text for pair in zip(named, ["", *map(_about, lines)], strict=True) for text in pair if text)


def _about(line: HookLine) -> str:
    layers = f"; {line.n_layers} layers" if "{l}" in line.name else ""
    text = f"{line.what}{layers}; fires {line.fires}"
    return textwrap.fill(text, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


def _line(row: HookRow, cfg: VLMConfig) -> HookLine:
    n_layers = 1
    if "{l}" in row.name:
        n_layers = cfg.vision.n_layers if is_vision(row.name) and cfg.vision else cfg.n_layers
    return HookLine(row.name, _tower(row.name), filled(row, cfg), n_layers, row.fires, row.what)


def _tower(name: str) -> Tower:
    if not is_vision(name):
        return "language"
    return "vision" if name.startswith("vision.") else "projector"


def _by_layer(line: HookLine) -> list[HookLine]:
    if "{l}" not in line.name:
        return [line]
    names = [line.name.replace("{l}", str(layer)) for layer in range(line.n_layers)]
    return [HookLine(name, line.tower, line.shape, 1, line.fires, line.what) for name in names]


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
