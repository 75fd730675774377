"""Activations of labelled pictures at one hook point, with what each token shows or is about to say."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.activations.write import stream_activations
from hooked_vlm.errors import InputError
from hooked_vlm.features.labelled import LabelledPicture
from hooked_vlm.features.meanings import Tokens
from hooked_vlm.nn.hooks import is_vision

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

CORNERS = ("x0", "y0", "x1", "y1")
At = Literal["image", "answer"]
"""Tokens of pictures, which show a label; or positions of the answer, from the last of the prompt on, whose next token
is one."""


@dataclass(frozen=True, eq=False)
class ReadTokens:
    """Tokens of pictures, or patches, for hook points of the vision tower; or positions of answers."""

    values: Float[Tensor, "token d"]
    """In float32, on the CPU."""
    boxes: Float[np.ndarray, "token 4"]
    """(x0, y0, x1, y1) in pixels of the picture; NaN for a token that stands for no place."""
    tokens: Tokens


def read_tokens(
    model: "HookedVLM",
    hook_name: str,
    pictures: Sequence[LabelledPicture],
    names: Sequence[str],
    *,
    at: At = "image",
    progress: bool = False,
) -> ReadTokens:
    """Run the model on pictures, as far as the hook point.

    Args:
        names: the labels, in the order of their columns.

    Raises:
        InputError: a sample that cannot be used, or none; answers at a hook point of the vision tower.
        HookError: a hook point that does not exist or has no rows.
        OutputError: no room for temporary files.
    """
    if len(pictures) < 2:
        raise InputError(f"pictures are halved, into those that choose and those that score: {len(pictures)} came")
    if at == "answer" and is_vision(hook_name):
        raise InputError(f"{hook_name} belongs to the pictures and has no positions of the answer: read it at image")
    with tempfile.TemporaryDirectory() as folder:
        samples = [picture.sample for picture in pictures]
        chosen = "image" if at == "image" else ("final", "generated")
        rows = stream_activations(model, samples, [hook_name], folder, tokens=chosen, progress=progress)[hook_name]
        values, table = rows[:].float().flatten(1), rows.index
    starts = np.flatnonzero(table["sample"].to_numpy() != table["sample"].shift().to_numpy()).tolist()
    if len(starts) != len(pictures):
        raise InputError("every sample needs a picture and an id of its own, which its neighbours do not have")
    number = np.repeat(np.arange(len(pictures)), np.diff(np.array([*starts, len(table)])))
    boxes = table[[*CORNERS]].to_numpy(float)
    kinds = tuple(picture.kind for picture in pictures)
    if at == "answer":
        labels, kept = _next_tokens(table, names)
        return ReadTokens(values[kept], boxes[kept], Tokens(labels[kept], number[kept], kinds))
    labels = [picture.labels(boxes[number == i], names) for i, picture in enumerate(pictures)]
    return ReadTokens(values, boxes, Tokens(np.concatenate(labels), number, kinds))


def _next_tokens(
    table: pd.DataFrame, names: Sequence[str]
) -> tuple[Bool[np.ndarray, "row label"], Bool[np.ndarray, "row"]]:
    """Which label the next token of each row is, and which rows have a next one in their sample."""
    sample, token = table["sample"].to_numpy(), table["token"].to_numpy()
    kept = np.append(sample[1:] == sample[:-1], False)
    following = np.append(token[1:], "")
    return np.array([[text == name for name in names] for text in following]), kept
