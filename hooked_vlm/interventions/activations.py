"""Interventions on any named activation: patching from another run, steering, replacing image tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import (
    Hooks,
    Intervention,
    Positions,
    first_image_position,
    first_position,
    image_tokens,
    layer_of,
    made_for,
    position_table,
    positions_mask,
    whole_numbers,
)
from hooked_vlm.nn.hooks import HookPoint, deepstack_points, is_quadratic, is_vision

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True, eq=False)
class PatchActivation(Intervention):
    """An activation is replaced by its values from another run.

    Args:
        name: the hook point.
        source: its whole tensor from the other run (`cache[name]`), with the rows and columns of these inputs.
        positions: where on the text side (query positions, for scores and patterns); for image-side tensors, which
            patches of every image, or a tuple for each image or tile (group names and "text" have no meaning there).
        heads: only these, where the tensor has a head axis.
    """

    name: str
    source: Float[Tensor, "..."]
    positions: Positions = None
    heads: Sequence[int] | None = None

    position_aware: ClassVar[bool] = True

    def first_layer(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        return layer_of(self.name, model.cfg.n_layers)

    def first_position(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        return first_position_at(self.name, self.positions, inputs)

    def hooks(self, model: "HookedVLM", inputs: VLMInputs) -> Hooks:
        inputs = model.as_inputs(inputs)
        head_axis = _head_axis(self.name)
        if self.heads is not None and head_axis is None:
            raise InputError(f"{self.name} has no head axis: leave out heads")
        where, shape = PositionsAt(self.name, self.positions, inputs), self.source.shape
        if where.table is not None and (*shape[:1], *shape[where.axis : where.axis + 1]) != inputs.shape:
            raise InputError(
                f"the source for {self.name} is {tuple(shape)}, with rows in the first place and columns in place "
                f"{where.axis}, but these inputs have {len(inputs)} rows and {inputs.shape[1]} columns: both runs need "
                "the same"
            )

        def patch(x: Tensor, hook: HookPoint) -> Tensor:
            source, axis = self.source, where.axis
            if where.table is not None:  # cut to this pass's positions
                first = where.first_position(hook)
                if first >= source.shape[axis]:
                    return x  # generation has gone past the other run
                source = source.to(x)
                n = min(x.shape[axis], source.shape[axis] - first)
                source = source.narrow(axis, first, n)
                if n < x.shape[axis] and not is_quadratic(self.name):  # tokens were appended since
                    source = torch.cat((source, x.narrow(axis, n, x.shape[axis] - n)), dim=axis)
            if source.shape != x.shape:
                raise InputError(
                    f"the source for {self.name} is {tuple(self.source.shape)}, which does not fit {tuple(x.shape)}"
                )
            here = where.mask(x, hook)
            if self.heads is not None and head_axis is not None:
                shape = [1] * x.ndim
                shape[head_axis] = x.shape[head_axis]
                if not all(0 <= head < x.shape[head_axis] for head in self.heads):
                    raise InputError(f"{self.name} has heads 0 to {x.shape[head_axis] - 1}, got {tuple(self.heads)}")
                chosen = torch.zeros(x.shape[head_axis], dtype=torch.bool, device=x.device)
                chosen[list(self.heads)] = True
                here = here & chosen.view(shape)
            return torch.where(here, source.to(x), x)

        return made_for(inputs, [(self.name, patch)])

    def __str__(self) -> str:
        heads = "" if self.heads is None else f" heads {','.join(map(str, self.heads))}"
        return f"PatchActivation {self.name}{heads} at {position_label(self.positions)}"


@dataclass(frozen=True, eq=False)
class AddVector(Intervention):
    """`scale` times a vector is added to an activation ("steering").

    Args:
        name: the hook point, e.g. "blocks.5.hook_resid_post".
        vector: its last axis, or its last axes where heads have one each.
        positions: as in `PatchActivation`.
    """

    name: str
    vector: Float[Tensor, "*head d"]
    scale: float = 1.0
    positions: Positions = None

    position_aware: ClassVar[bool] = True

    def first_position(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        return first_position_at(self.name, self.positions, inputs)

    def hooks(self, model: "HookedVLM", inputs: VLMInputs) -> Hooks:
        inputs = model.as_inputs(inputs)
        where = PositionsAt(self.name, self.positions, inputs)

        def add(x: Tensor, hook: HookPoint) -> Tensor:
            if x.shape[-self.vector.ndim :] != self.vector.shape:
                shape = tuple(self.vector.shape)
                raise InputError(f"a vector of {shape} cannot be added to {self.name}, which is {tuple(x.shape)}")
            return torch.where(where.mask(x, hook), x + self.scale * self.vector.to(x), x)

        return made_for(inputs, [(self.name, add)])

    def __str__(self) -> str:
        return f"AddVector {self.scale:g} at {self.name}, {position_label(self.positions)}"


@dataclass(frozen=True, eq=False)
class ReplaceImageTokens(Intervention):
    """Features of image tokens are replaced wherever they enter the decoder: at the embedding and, with DeepStack,
    behind its first blocks.

    Args:
        tokens: which image tokens ("image" for all; `inputs.tokens_in_box` for a region).
        values: "mean" over the tokens of the same image, "zero", or a vector [d_model]; with DeepStack one for each
            place, [feature, d_model], the embedding's first.
    """

    tokens: Positions = "image"
    values: Literal["mean", "zero"] | Float[Tensor, "*feature d_model"] = "mean"

    position_aware: ClassVar[bool] = True

    def first_position(self, model: "HookedVLM", inputs: VLMInputs) -> int:
        table = image_tokens(self.tokens, inputs)
        touched = [v.start for v in inputs.visuals if table[v.row, v.positions].any()]
        return min(touched, default=inputs.shape[1])  # a mean needs the whole image

    def hooks(self, model: "HookedVLM", inputs: VLMInputs) -> Hooks:
        inputs = model.as_inputs(inputs)
        table = image_tokens(self.tokens, inputs).to(inputs.device)
        if not isinstance(self.values, Tensor) and self.values not in ("mean", "zero"):
            raise InputError(f'values must be "mean", "zero" or a vector, got {self.values!r}')
        n_inner, d_model = model.cfg.n_deepstack, model.cfg.d_model
        expected = (1 + n_inner, d_model) if n_inner else (d_model,)
        if isinstance(self.values, Tensor) and tuple(self.values.shape) != expected:
            several = f", one for the embedding and one behind each of {n_inner} blocks" if n_inner else ""
            raise InputError(
                f"values must be a vector of {d_model} numbers{several}, {expected}, got {tuple(self.values.shape)}"
            )

        def replace(entry: int, x: Tensor, hook: HookPoint) -> Tensor:
            first = hook.ctx["first_position"]
            new = torch.zeros_like(x)
            if isinstance(self.values, Tensor):
                new = new + self.values.view(-1, d_model)[entry].to(x)
            elif self.values == "mean":
                for visual in (v for v in inputs.visuals if v.start >= first):
                    span = visual.positions - first
                    new[visual.row, span] = x[visual.row, span].mean(0)
            return torch.where(positions_mask(table, first, x.shape[1], len(x))[..., None].to(x.device), new, x)

        names = ["hook_embed", *deepstack_points(n_inner)]
        return made_for(inputs, [(name, partial(replace, entry)) for entry, name in enumerate(names)])

    def __str__(self) -> str:
        values = self.values if isinstance(self.values, str) else "a vector"
        return f"ReplaceImageTokens {position_label(self.tokens)} by {values}"


class PositionsAt:
    """The axis and mask of some positions in a hook point's tensor."""

    def __init__(self, name: str, positions: Positions, inputs: VLMInputs) -> None:
        self.name, self.positions = name, positions
        self.axis = 0 if name == "hook_image_features" else 2 if is_quadratic(name) else 1
        self.table = None if is_vision(name) else position_table(positions, inputs).to(inputs.device)
        if is_vision(name) and isinstance(positions, str):
            raise InputError(f"{name} is on the image side: its patches have numbers, not groups like {positions!r}")

    def first_position(self, hook: HookPoint) -> int:
        if "first_position" not in hook.ctx:
            raise InputError(f'rows end at different positions, so {self.name} holds no one of them: logits_at="all"')
        return hook.ctx["first_position"]

    def mask(self, x: Tensor, hook: HookPoint) -> Bool[Tensor, "..."]:
        """True at the selected positions; broadcasts against `x`."""
        if self.table is None:
            here = self._patches(x)
        else:
            here = positions_mask(self.table, self.first_position(hook), x.shape[self.axis], len(x)).to(x.device)
        shape = [1] * x.ndim
        shape[0], shape[self.axis] = len(here), here.shape[1]
        if self.axis == 0:
            shape[0] = here.shape[1]
        return here.view(shape)

    def _patches(self, x: Tensor) -> Bool[Tensor, "images patch"]:
        """The same patches of every image, or different ones for each image."""
        chosen: Any = () if self.positions is None else self.positions
        per_image = self.axis > 0 and len(chosen) > 0 and isinstance(chosen[0], tuple)
        if per_image and len(chosen) != len(x):
            raise InputError(f"there are patches for {len(chosen)} images, but {self.name} holds {len(x)}")
        here = torch.zeros(len(x) if per_image else 1, x.shape[self.axis], dtype=torch.bool)
        for patches in chosen if per_image else [chosen]:
            if not whole_numbers(patches) or any(not 0 <= patch < here.shape[1] for patch in patches):
                raise InputError(f"the patches of {self.name} are numbered 0 to {here.shape[1] - 1}, got {patches!r}")
        if self.positions is None:
            here[:] = True
        for image, patches in enumerate(chosen if per_image else [chosen]):
            here[image, list(patches)] = True
        return here.to(x.device)


def first_position_at(name: str, positions: Positions, inputs: VLMInputs) -> int:
    """The first position of the decoder that an edit of a hook point reaches."""
    return first_image_position(inputs) if is_vision(name) else first_position(position_table(positions, inputs))


def _head_axis(name: str) -> int | None:
    per_head = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q", "hook_rot_k", "hook_result")
    per_head += ("hook_q_normed", "hook_k_normed", "hook_q_input", "hook_k_input", "hook_v_input")
    if name.endswith(("hook_attn_scores", "hook_pattern")):
        return 1
    return 2 if name.endswith(per_head) else None


def position_label(positions: Positions) -> str:
    """Name of positions in texts and tables."""
    return "all positions" if positions is None else positions if isinstance(positions, str) else f"{positions}"
