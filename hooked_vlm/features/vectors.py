"""Vectors of a hook point's tensor: those that a dictionary reads and writes, and those that are padding."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.errors import FeatureError
from hooked_vlm.features.dictionary import FeatureDictionary, row_of
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import Hooks, n_patches, position_table
from hooked_vlm.nn.hooks import HookPoint, is_vision

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Write = Callable[[Tensor, Tensor, HookPoint], Tensor | None]
"""(vectors that are read, vectors at the hook point that is written, this point) -> what is written in their place."""


def vectors_at(x: Float[Tensor, "..."], width: int, name: str) -> Float[Tensor, "*at width"]:
    """A hook point's tensor as vectors of the dictionary's width: heads are joined where it reads all of them.

    Raises:
        FeatureError: another width.
    """
    joined = x.flatten(-2) if x.ndim == 4 else x  # [batch, pos, head, d]
    if joined.shape[-1] != width:
        raise FeatureError(f"the dictionary has {width} numbers at {name!r}, whose tensor is {list(x.shape)}")
    return joined


def dictionary_hooks(dictionary: FeatureDictionary, write: Write) -> Hooks:
    """Hooks that read vectors and write others: one hook, or two for a transcoder, made for one run at a time."""
    read, written = dictionary.hook_name, dictionary.out_hook_name
    kept: list[tuple[Tensor, int | None]] = []

    def keep(x: Tensor, hook: HookPoint) -> None:
        # a copy: hooks behind this one may write into the tensor
        kept[:] = [(vectors_at(x, dictionary.d_in, read).clone(), hook.ctx.get("first_position"))]

    def rewrite(y: Tensor, hook: HookPoint) -> Tensor | None:
        out = vectors_at(y, dictionary.d_out, written)
        if read == written:
            x = out
        elif kept:
            x = _cut(*kept.pop(), out, hook)
        else:
            raise FeatureError(f"the model computes {written!r} before {read!r}: a transcoder reads before it writes")
        new = write(x, out, hook)
        return None if new is None else new.to(y).reshape(y.shape)

    return [(written, rewrite)] if read == written else [(read, keep), (written, rewrite)]


def _cut(
    x: Float[Tensor, "row column d_in"], first: int | None, out: Float[Tensor, "row own d_out"], hook: HookPoint
) -> Float[Tensor, "row own d_in"]:
    """Columns of `x`, which begins at position `first`, that a pass also computes at a later hook point."""
    if x.shape[:-1] == out.shape[:-1]:
        return x
    begin = hook.ctx.get("first_position")
    if first is None or begin is None or len(x) != len(out) or x.shape[1] < out.shape[1]:
        raise FeatureError(f"{hook.name!r} has {list(out.shape[:-1])} vectors, but {list(x.shape[:-1])} were read")
    return x[:, begin - first : begin - first + out.shape[1]]


def real_vectors(model: "HookedVLM", name: str, inputs: VLMInputs) -> Bool[Tensor, "row column"]:
    """Vectors of a hook point that are not padding; one row where the point has no axis of rows."""
    if not is_vision(name):
        return position_table(None, inputs)[:, :-1]
    axes = row_of(model, name).shape
    counts = n_patches(inputs)
    if axes[1] == "token":
        counts = tuple((n - inputs.spec.class_tokens) // model.projector.token_size**2 for n in counts)
    elif axes[0] == "image_token":
        counts = (sum(len(visual.positions) for visual in inputs.visuals),)
    return torch.arange(max(counts, default=0))[None] < torch.tensor(counts)[:, None]


def without_padding(
    features: Float[Tensor, "*at feature"], real: Bool[Tensor, "row column"], hook: HookPoint
) -> Float[Tensor, "*at feature"]:
    """Activations in a pass over all columns, the last ones, or the last one of each row, those of padding set to 0.

    Args:
        real: as of `real_vectors`.
    """
    ends_apart = not is_vision(hook.name or "") and "first_position" not in hook.ctx
    if real.all() or ends_apart:  # the last position of each row
        return features
    here = (real if features.ndim == 3 else real[0])[..., -features.shape[-2] :]
    return features * here[..., None].to(features.device)
