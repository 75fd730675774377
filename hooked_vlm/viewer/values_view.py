"""Any quantity on image tokens as the same page: lenses, patching effects, coefficients."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.lens import LogitLens
from hooked_vlm.patching.result import PatchingResult
from hooked_vlm.viewer.facts import facts_of
from hooked_vlm.viewer.scene import Boxes, image_columns, one_row, scene_of
from hooked_vlm.viewer.view import Chip, Head, View, view_of

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Axis = Literal["row", "layer", "head"]
AXES: tuple[Axis, ...] = ("row", "layer", "head")


def values(
    inputs: VLMInputs,
    numbers: Float[np.ndarray | Tensor, "*axes token"],
    axes: Sequence[Axis] = (),
    *,
    rows: Sequence[Any] | None = None,
    layers: Sequence[Any] | None = None,
    heads: Sequence[Any] | None = None,
    ranked: Sequence[Head] = (),
    images: Any = None,
    boxes: Boxes | None = None,
    quantity: str = "value",
    title: str = "Values on the image",
    note: str = "",
    model: "HookedVLM | None" = None,
) -> View:
    """Numbers on image tokens as a page. NaN stays clear; zero is the middle of the colours if any number is negative.

    Args:
        inputs: one prompt with images.
        numbers: the last axis has all tokens of all images, in the order of `inputs.image_tokens`.
        axes: what the axes before it are, e.g. ("layer", "head").
        rows: labels of the axis; counted from 0 by default.
        layers: likewise.
        heads: likewise.
        ranked: places of heads to step through, as (layer, head).
        quantity: name of the values.
        note: what the page says of the numbers.
        model: for the head of the page, which names it beside the prompt.

    Raises:
        InputError: axes, labels and images that do not fit the numbers.
    """
    inputs = one_row(inputs)
    array = numbers.detach().float().cpu().numpy() if isinstance(numbers, torch.Tensor) else np.asarray(numbers)
    if array.ndim != len(axes) + 1 or len(set(axes)) != len(axes) or not set(axes) <= set(AXES):
        raise InputError(f"{array.ndim} axes came, named {(*axes, 'token')}: name each before the last, of {AXES}")
    order = [axes.index(name) for name in AXES if name in axes]
    laid = array.transpose(*order, len(axes)).astype(np.float32)
    laid = laid[tuple(slice(None) if name in axes else None for name in AXES)]
    named = zip(AXES, (rows, layers, heads), laid.shape, strict=False)
    labels = [(range(n) if axis in axes else ("",)) if own is None else own for axis, own, n in named]
    if len(labels[0]) != len(laid):
        raise InputError(f"{len(labels[0])} labels came for {len(laid)} rows")
    return view_of(
        scene_of(inputs, images, () if boxes is None else boxes),
        laid,
        [Chip(str(label) if "row" in axes else quantity, "row", row) for row, label in enumerate(labels[0])],
        labels[1],
        labels[2],
        None,
        ranked,
        title=title,
        note=note,
        quantity=quantity,
        layer=laid.shape[1] - 1,
        facts=facts_of(inputs, model),
    )


def lens(
    model: "HookedVLM", inputs: VLMInputs, found: LogitLens, *, images: Any = None, boxes: Boxes | None = None
) -> View:
    """The probability of each target of a logit lens at the image tokens, layer by layer.

    Raises:
        InputError: the lens had no targets, or did not look at all image tokens.
    """
    columns = image_columns(one_row(inputs))
    at = {int(pos): entry for entry, pos in enumerate(found.positions)}
    if not found.targets or not set(columns) <= set(at):
        raise InputError(
            'the lens must look at the image for a target: logit_lens(model, inputs, "image", targets=...)'
        )
    probabilities = np.exp(found.target_log_probs[:, [at[pos] for pos in columns]])
    return values(
        inputs,
        np.moveaxis(probabilities, -1, 0),
        ("row", "layer"),
        rows=[model.to_string([token]) for token in found.targets],
        layers=found.layers,
        images=images,
        boxes=boxes,
        quantity="probability",
        title="What the stream says at image tokens",
        note="The probability of a token in the logit lens; layer l is the stream that enters layer l.",
        model=model,
    )


def patching(inputs: VLMInputs, result: PatchingResult, *, images: Any = None, boxes: Boxes | None = None) -> View:
    """The mean effects of a patching sweep over "each" position, on the image tokens. Positions left out stay clear.

    Raises:
        InputError: the places of the result are not positions.
    """
    places = result.axes.get("place", ())
    if not places or not all(isinstance(place, int) for place in places):
        raise InputError('the places of this result are not positions: sweep where="each" to lay it over a picture')
    names = list(result.axes)
    means = np.moveaxis(result.mean, names.index("place"), -1)
    names.remove("place")
    columns = {pos: n for n, pos in enumerate(image_columns(one_row(inputs)))}
    laid = np.full((*means.shape[:-1], len(columns)), np.nan)
    for n, place in enumerate(places):
        if place in columns:
            laid[..., columns[int(place)]] = means[..., n]
    kept: list[Axis] = [name for name in AXES if name in names]
    if len(kept) < len(names):
        raise InputError(f"a page has layers and heads: select one of each other axis, got {names}")
    laid = np.moveaxis(laid, [names.index(name) for name in kept], range(len(kept)))
    return values(
        inputs,
        laid,
        kept,
        images=images,
        boxes=boxes,
        quantity=result.label,
        title=result.title,
        note="The mean effect of patching each image token.",
        rows=result.axes.get("row"),
        layers=result.axes.get("layer"),
        heads=result.axes.get("head"),
    )
