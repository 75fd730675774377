"""The state of an interrupted training as one safetensors file; its metadata say which training, and how far."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.runtime.files import atomic_write, why

FORMAT = 1
KEY = "hooked_vlm.training"


class Checkpoint(NamedTuple):
    """A training after some steps."""

    key: str
    """Digest of all that decides its numbers."""
    step: int
    measured: list[dict[str, int | float]]
    """Lines of training.csv so far."""
    state: Mapping[str, Tensor]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write it, in place of an older one.

    Raises:
        OutputError: it cannot be written; the older one is left.
    """
    about = {"format": FORMAT, "key": checkpoint.key, "step": checkpoint.step, "measured": checkpoint.measured}
    tensors = {name: x.contiguous() for name, x in checkpoint.state.items()}
    atomic_write(path, lambda aside: save_file(tensors, aside, {KEY: json.dumps(about)}))


def read_checkpoint(path: Path, key: str) -> Checkpoint | None:
    """The state that is stored; None where there is none.

    Raises:
        InputError: it is damaged, or that of another training.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt", device="cpu") as file:
            about: Any = json.loads((file.metadata() or {})[KEY])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        found = Checkpoint(about["key"], int(about["step"]), list(about["measured"]), state)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({why(error)}): delete it to train from the beginning") from error
    if about.get("format") != FORMAT or found.key != key:
        raise InputError(
            f"{path.parent} holds a training with other settings or on other activations: choose another folder"
        )
    return found
