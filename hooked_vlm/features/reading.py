"""Activations of labelled pictures at one hook point, with what each token shows."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.activations.write import stream_activations
from hooked_vlm.errors import InputError
from hooked_vlm.features.labelled import LabelledPicture
from hooked_vlm.features.meanings import Tokens

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

CORNERS = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True, eq=False)
class ReadTokens:
    """Image tokens (or patches, for hook points of the vision tower) of pictures."""

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
    progress: bool = False,
) -> ReadTokens:
    """Run the model on pictures, as far as the hook point.

    Args:
        names: the labels, in the order of their columns.

    Raises:
        InputError: a sample that cannot be used, or none.
        HookError: a hook point that does not exist or has no rows.
        OutputError: no room for temporary files.
    """
    if len(pictures) < 2:
        raise InputError(f"pictures are halved, into those that choose and those that score: {len(pictures)} came")
    with tempfile.TemporaryDirectory() as folder:
        samples = [picture.sample for picture in pictures]
        rows = stream_activations(model, samples, [hook_name], folder, tokens="image", progress=progress)[hook_name]
        values, table = rows[:].float().flatten(1), rows.activations.table(rows.kind, ["sample", *CORNERS])
    starts = np.flatnonzero(table["sample"].to_numpy() != table["sample"].shift().to_numpy()).tolist()
    if len(starts) != len(pictures):
        raise InputError("every sample needs a picture and an id of its own, which its neighbours do not have")
    boxes = table[[*CORNERS]].to_numpy(float)
    stops = [*starts[1:], len(table)]
    labels = [
        picture.labels(boxes[start:stop], names) for picture, start, stop in zip(pictures, starts, stops, strict=True)
    ]
    number = np.repeat(np.arange(len(pictures)), np.diff(np.array([*starts, len(table)])))
    return ReadTokens(values, boxes, Tokens(np.concatenate(labels), number, tuple(own.kind for own in pictures)))
