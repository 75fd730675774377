"""The command line that repeats a run."""

import shlex
from dataclasses import fields, is_dataclass
from typing import Any, get_args

from hooked_vlm.experiments.common.workers import NOT_RECORDED

LEFT_OUT = ("out", "quiet", *NOT_RECORDED)
"""Settings that no result depends on."""


def command_line(study: str, config: Any, commands: Any) -> str:
    """The `hooked-vlm` command of a configuration: the model, and every setting that is not the default.

    Args:
        study: "ocr-heads" or "head-attribution".
        commands: the study's union of annotated configurations. A configuration outside it has no command: "".
    """
    names = {kind: marker.name for kind, marker in map(get_args, get_args(commands))}
    if type(config) not in names:
        return ""
    model = ["--model", str(config.model)]
    return shlex.join(["hooked-vlm", study, names[type(config)], *model, *changed_settings(config, type(config)())])


def changed_settings(config: Any, default: Any) -> list[str]:
    """Settings that differ from the defaults, as words of a command line, without the model; those of nested settings
    have no prefix."""
    return [
        word
        for name, values in _changed(config, default).items()
        if name != "model"
        for word in ("--" + name.replace("_", "-"), *values)
    ]


def _changed(config: Any, default: Any) -> dict[str, list[str]]:
    changed = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in LEFT_OUT or value == getattr(default, field.name):
            continue
        if is_dataclass(value):
            changed |= _changed(value, type(value)())
        elif isinstance(value, bool):
            changed[field.name] = []
        else:
            changed[field.name] = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
    return changed
