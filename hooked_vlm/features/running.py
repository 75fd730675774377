"""Runs with dictionaries in the loop."""

from collections.abc import Callable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.errors import FeatureError
from hooked_vlm.features.dictionary import FeatureDictionary, check_places
from hooked_vlm.features.edits import EditFeatures
from hooked_vlm.features.vectors import Write, dictionary_hooks, real_vectors, without_padding
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import Compose, Hooks, Intervention, made_for
from hooked_vlm.nn.hooks import HookName, HookPoint

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Features = dict[str, Float[Tensor, "..."]]
"""Activations by the hook point that they are read from, [batch, pos, feature] on the text side."""


def run_with_features(
    model: "HookedVLM",
    inputs: Any,
    dictionaries: Mapping[str, FeatureDictionary],
    *,
    error_term: bool = True,
    edits: Sequence[Intervention] = (),
    fwd_hooks: Sequence[tuple[HookName, Callable]] = (),
    **run: Any,
) -> tuple[Any, Features]:
    """Run `forward` with the stream written as features, by the dictionaries.

    What a dictionary writes is decode(f), with the error term decode(f) + (x - decode(f)), which is x. The error is a
    constant to gradients, as in SAELens: the gradient at f is that of the output along the feature's direction, and
    what reaches earlier layers, and dictionaries there, passes the encoder. (`feature_attribution` lets it pass by the
    dictionary instead: its gradients are those of edits, in earlier dictionaries too.)

    With gradients switched on, `output.backward()` on a loss gives `features[name].grad`.

    Args:
        dictionaries: by the hook point that each reads. One that writes at the hook point of another comes before it.
        error_term: False for a stream that is the reconstruction alone.
        edits: interventions, those of a `Compose` one by one. `EditFeatures` of one of these dictionaries change f, in
            this order; others act before the dictionaries read.
        fwd_hooks: hooks of your own, behind the dictionaries.
        run: arguments of `forward`.

    Returns:
        The output of `forward`, and the activations after edits. Those of padding are 0.

    Raises:
        FeatureError: a dictionary under another name than that of its hook point, or of another width.
        HookError: a hook point that the model does not have, or that this run does not pass.
        InputError: edits in a run that continues a key-value cache.
    """
    inputs = model.as_inputs(inputs)
    features: Features = {}
    hooks: Hooks = []
    within = []
    check_places(dictionaries, model)
    edits = [part for edit in edits for part in _parts(edit)]
    for dictionary in _writers_first(dictionaries):
        own = [edit for edit in edits if isinstance(edit, EditFeatures) and edit.dictionary is dictionary]
        within += own
        writing = dictionary_hooks(dictionary, _writer(model, inputs, dictionary, own, features, error_term))
        hooks += made_for(inputs, writing) if own else writing
    before = [pair for edit in edits if edit not in within for pair in edit.hooks(model, inputs)]
    return model.run_with_hooks(inputs, fwd_hooks=[*before, *hooks, *fwd_hooks], **run), features


def _writers_first(dictionaries: Mapping[str, FeatureDictionary]) -> list[FeatureDictionary]:
    """Dictionaries in an order in which what one writes is what another reads there, whatever that of the mapping.

    Raises:
        FeatureError: two of them each write where the other reads.
    """
    before = {
        name: [other for other, each in dictionaries.items() if each.out_hook_name == name != other]
        for name in dictionaries
    }
    try:
        return [dictionaries[name] for name in TopologicalSorter(before).static_order()]
    except CycleError as error:
        raise FeatureError(f"each of these dictionaries writes where another reads: {', '.join(before)}") from error


def _parts(edit: Intervention) -> list[Intervention]:
    """An intervention, or all those that a `Compose` holds."""
    return [part for each in edit.parts for part in _parts(each)] if isinstance(edit, Compose) else [edit]


def _writer(
    model: "HookedVLM",
    inputs: VLMInputs,
    dictionary: FeatureDictionary,
    edits: Sequence[EditFeatures],
    features: Features,
    error_term: bool,
) -> Write:
    real = real_vectors(model, dictionary.out_hook_name, inputs)
    everywhere = [(edit, edit.where(inputs)) for edit in edits]

    def write(x: Tensor, out: Tensor, hook: HookPoint) -> Tensor:
        f = plain = without_padding(dictionary.encode(x), real, hook)
        for edit, where in everywhere:
            f = edit.edited(f, where.mask(out, hook))
        features[dictionary.hook_name] = f = _with_gradient(f)
        written = dictionary.decode(f, x)
        if not error_term:
            return written
        reconstruction = written if f is plain else dictionary.decode(plain, x)
        return written + (out.to(written) - reconstruction).detach()

    return write


def _with_gradient(features: Tensor) -> Tensor:
    """Have a backward pass keep the gradient, whether or not weights and stream have one."""
    if not torch.is_grad_enabled():
        return features
    if features.requires_grad:
        features.retain_grad()
        return features
    return features.requires_grad_()
