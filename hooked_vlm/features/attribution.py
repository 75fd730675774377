"""Attribution to features: gradient times activation, for a metric and between two dictionaries."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.errors import FeatureError, InputError
from hooked_vlm.features.dictionary import FeatureDictionary, check_fits, check_places
from hooked_vlm.features.running import Features
from hooked_vlm.features.vectors import dictionary_hooks, real_vectors, without_padding
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.activations import PositionsAt
from hooked_vlm.interventions.base import Hooks, Positions
from hooked_vlm.metrics import Metric
from hooked_vlm.nn.hooks import HookPoint
from hooked_vlm.sweeps.run import measure

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

LogitsAt = Literal["last", "all"]


def feature_attribution(
    model: "HookedVLM",
    inputs: Any,
    dictionaries: Mapping[str, FeatureDictionary],
    metric: Metric,
    *,
    method: Literal["gradient", "integrated"] = "gradient",
    steps: int = 10,
    baseline: Mapping[str, Tensor] | None = None,
    logits_at: LogitsAt = "last",
) -> Features:
    """Attribute a metric to the activations of features, at every position.

    The gradient at a feature is the derivative of the metric under `EditFeatures`: the error of the dictionary stays,
    and gradients of earlier layers pass by the dictionary. Times the activation it estimates what ablating the feature
    takes away (Marks et al., arXiv 2403.19647).

    Args:
        dictionaries: by the hook point that each reads; all of them at the cost of one backward pass.
        method: "integrated" averages the gradient over the straight path from the baseline to the activations, all
            features of a dictionary at once (Sundararajan et al., arXiv 1703.01365): the attributions of one dictionary
            then sum to the metric minus the metric at the baseline, up to the error of `steps`.
        steps: of the path, at the middles of its parts; each is a forward and a backward pass for each dictionary.
        baseline: activations in place of zero by hook point, [feature] or as activations are.

    Returns:
        For each hook point activation minus baseline, times gradient, [batch, pos, feature] on the text side; summed
        over rows it is that of the sum of the metric. 0 at padding.

    Raises:
        InputError: a metric without gradient, or not one number for each row; steps below 1; another method.
        FeatureError: no dictionary, one that does not fit the model or its name, a baseline of another shape.
    """
    if method not in ("gradient", "integrated"):
        raise InputError(f'method is "gradient" or "integrated", got {method!r}')
    if not dictionaries:
        raise FeatureError("no dictionary is given: {hook_name: dictionary}")
    if steps < 1:
        raise InputError(f"a path has at least one step, got {steps}")
    inputs = model.as_inputs(inputs)
    check_places(dictionaries, model)
    if others := sorted(set(baseline or ()) - set(dictionaries)):
        raise FeatureError(f"there is a baseline, but no dictionary, for {others[0]!r}")
    zero = {name: torch.zeros(()) for name in dictionaries} | dict(baseline or {})

    def gradients(own: Mapping[str, FeatureDictionary], share: float) -> tuple[Features, Features]:
        """Activations, and the metric's gradients at this share of the way from the baseline to them."""
        passes = [_PassBy(model, inputs, each, _on_the_way(zero[name], share)) for name, each in own.items()]
        with torch.enable_grad():
            hooks = [pair for each in passes for pair in each.hooks()]
            logits = model.run_with_hooks(inputs, fwd_hooks=hooks, logits_at=logits_at)
            found = _gradients(measure(metric, logits, logits_at).sum(), [each.leaf for each in passes])
        return {name: each.plain for name, each in zip(own, passes, strict=True)}, dict(zip(own, found, strict=True))

    if method == "gradient":
        plain, slopes = gradients(dictionaries, 1.0)
        return {name: (f - zero[name].to(f)) * slopes[name] for name, f in plain.items()}
    found: Features = {}
    for name, dictionary in dictionaries.items():
        for step in range(steps):
            plain, slopes = gradients({name: dictionary}, (step + 0.5) / steps)
            part = (plain[name] - zero[name].to(plain[name])) * slopes[name] / steps
            found[name] = found[name] + part if step else part
    return found


def feature_edges(
    model: "HookedVLM",
    inputs: Any,
    lower: FeatureDictionary,
    upper: FeatureDictionary,
    *,
    positions: Positions = "final",
    metric: Metric | None = None,
    logits_at: LogitsAt = "last",
) -> pd.DataFrame:
    """Effect of every active feature of one dictionary on every active feature of a later one.

    The weight of an edge is the gradient of the upper activation at the lower one, times the lower one: what ablating
    the lower feature takes from the upper one, to first order. With a metric it is multiplied by the metric's gradient
    at the upper activation: the part of the lower feature's attribution that goes through the upper feature.

    Every upper feature costs a backward pass between the two hook points, and the table has a row for each pair of
    active features: for dictionaries that are not sparse, choose few positions.

    Args:
        lower: writes before `upper` reads.
        positions: of the upper features, at the hook point that is read (as in `PatchActivation`).

    Returns:
        One row for each edge that is not 0, the largest first: `lower row`, `lower position`, `lower feature`,
        `upper row`, `upper position`, `upper feature`, `weight`. Rows and positions are those of the hook points'
        tensors, images and patches in the vision tower.

    Raises:
        FeatureError: a dictionary that does not fit the model, or `upper` reads before `lower` writes.
    """
    inputs = model.as_inputs(inputs)
    for dictionary in (lower, upper):
        check_fits(dictionary, model)
    where = PositionsAt(upper.hook_name, positions, inputs)
    below, above = _PassBy(model, inputs, lower), _PassBy(model, inputs, upper)
    chosen: list[Tensor] = []

    def choose(x: Tensor, hook: HookPoint) -> None:
        if below.leaf is None:
            raise FeatureError(f"{upper.hook_name!r} is read before {lower.out_hook_name!r} is written")
        chosen.append(where.mask(x, hook).flatten(min(2, x.ndim - 1)).any(-1))

    with torch.enable_grad():
        hooks = [*below.hooks(), (upper.hook_name, choose), *above.hooks()]
        logits = model.run_with_hooks(inputs, fwd_hooks=hooks, logits_at=logits_at)
        slopes = torch.ones_like(above.plain)
        if metric is not None:
            (slopes,) = _gradients(measure(metric, logits, logits_at).sum(), [above.leaf], keep=True)
    active = (above.plain != 0) & chosen[0][..., None].to(above.plain.device)
    columns = [f"{side} {what}" for side in ("lower", "upper") for what in ("row", "position", "feature")]
    parts = [pd.DataFrame({**dict.fromkeys(columns, np.empty(0, int)), "weight": np.empty(0)})]
    for place in active.nonzero() if above.with_graph.requires_grad else ():
        own = tuple(place.tolist())
        (gradient,) = _gradients(above.with_graph[own], [below.leaf], keep=True)
        weights = gradient * below.plain * slopes[own].to(gradient)
        edges = weights.nonzero()
        ends = torch.cat((_places(edges), _places(place[None]).to(edges.device).expand(len(edges), -1)), dim=1)
        parts.append(pd.DataFrame(ends.cpu().numpy(), columns=columns))
        parts[-1]["weight"] = weights[edges.unbind(1)].double().cpu().numpy()
    table = pd.concat(parts)
    return table.sort_values("weight", key=abs, ascending=False, kind="stable", ignore_index=True)


def _places(indices: Int[Tensor, "edge axis"]) -> Int[Tensor, "edge 3"]:
    """Row, position and feature; the one row of a hook point without an axis of rows is 0."""
    return indices if indices.shape[1] == 3 else torch.nn.functional.pad(indices, (1, 0))


class _PassBy:
    """A dictionary in a run, whose features are leaves of the graph, and which gradients of the stream pass by.

    Args:
        at: the activations that the run has in place of its own.
    """

    plain: Float[Tensor, "*at feature"]
    """The run's own activations, without gradient."""
    with_graph: Float[Tensor, "*at feature"]
    """The same, as functions of what comes before."""
    leaf: Float[Tensor, "*at feature"] | None = None
    """What the run has."""

    def __init__(
        self,
        model: "HookedVLM",
        inputs: VLMInputs,
        dictionary: FeatureDictionary,
        at: Callable[[Tensor], Tensor] = lambda features: features,
    ) -> None:
        self.dictionary, self.at = dictionary, at
        self.real = real_vectors(model, dictionary.out_hook_name, inputs)

    def hooks(self) -> Hooks:
        return dictionary_hooks(self.dictionary, self._write)

    def _write(self, x: Tensor, out: Tensor, hook: HookPoint) -> Tensor:
        self.with_graph = without_padding(self.dictionary.encode(x), self.real, hook)
        self.plain, constant = self.with_graph.detach(), x.detach()
        self.leaf = self.at(self.plain).clone().requires_grad_()
        change = self.dictionary.decode(self.leaf, constant) - self.dictionary.decode(self.plain, constant)
        return out + change.to(out)


def _on_the_way(baseline: Tensor, share: float) -> Callable[[Tensor], Tensor]:
    def at(features: Tensor) -> Tensor:
        if baseline.shape not in ((), features.shape[-1:], features.shape):
            shapes = f"{list(features.shape[-1:])} or {list(features.shape)}"
            raise FeatureError(f"a baseline is {shapes}, as activations are, got {list(baseline.shape)}")
        return torch.lerp(baseline.to(features).expand_as(features), features, share)

    return at


def _gradients(value: Tensor, leaves: list[Tensor | None], keep: bool = False) -> list[Tensor]:
    """Gradients of one number; zeros where it does not depend on a leaf.

    Raises:
        InputError: it has no gradient at all.
    """
    own = [leaf for leaf in leaves if leaf is not None]
    if not value.requires_grad:
        raise InputError("the metric has no gradient, which an attribution needs: ablate features with EditFeatures")
    return list(torch.autograd.grad(value, own, retain_graph=keep, allow_unused=True, materialize_grads=True))
