"""The target of one picture under ablations of what heads see of it (arXiv 2509.17588, head ablation)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig, Target
from hooked_vlm.experiments.head_attribution.tasks import Case
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import Head, ImageMeans, Intervention, ReplaceImageKV, mean_image_kv
from hooked_vlm.interventions.attention import all_heads
from hooked_vlm.interventions.base import Positions
from hooked_vlm.metrics import Metric, log_prob, logit, logit_difference, margin
from hooked_vlm.sweeps.engine import sweep


def metric_of(case: Case, target: Target) -> Metric:
    """What is measured of the answer's first token.

    Raises:
        StudyError: a difference is asked for and there is no other answer to compare with.
    """
    if target == "difference":
        if case.foil is None:
            raise StudyError("--target difference needs pictures with different names: all answers here are the same")
        return logit_difference(case.target, case.foil)
    return {"logit": logit, "log_prob": log_prob, "margin": margin}[target](case.target)


@dataclass(frozen=True, eq=False)
class Probe:
    """One picture, and what its target becomes when heads lose sight of it.

    Heads are numbered layer by layer; sets of them are masks over these numbers, True for kept.
    """

    model: Any
    case: Case
    metric: Metric
    baseline: Literal["mean", "zero", "knockout"] | ImageMeans = "mean"
    before_rope: bool = True

    def portable(self) -> "Probe":
        """To be sent: on the CPU and without the model, which `on` puts in its place again."""
        return self._moved(None, self.case.inputs.portable(), "cpu")

    def on(self, model: Any) -> "Probe":
        """On a replica of the model."""
        return self._moved(model, model.as_inputs(self.case.inputs), model.cfg.device)

    def _moved(self, model: Any, inputs: VLMInputs, device: torch.device | str) -> "Probe":
        baseline = self.baseline
        if isinstance(baseline, ImageMeans):
            baseline = replace(baseline, keys=baseline.keys.to(device), values=baseline.values.to(device))
        return replace(self, model=model, case=replace(self.case, inputs=inputs), baseline=baseline)

    @cached_property
    def heads(self) -> tuple[Head, ...]:
        return all_heads(self.model)

    def measure(self, runs: Sequence[Intervention]) -> Float[np.ndarray, "run"]:
        """The target of every run, in one sweep."""
        result = sweep(self.model, self.case.inputs, runs, self.metric)
        return result.values[:, 0].double().numpy()

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The target with every head in place, and with all of them ablated for all text."""
        full, none = self.measure([self.ablated(()), self.ablated(self.heads)])
        return float(full), float(none)

    @cached_property
    def image(self) -> tuple[int, ...]:
        """Positions of the picture's tokens."""
        return tuple(self.case.inputs.positions.image[0].tolist())

    @cached_property
    def text(self) -> tuple[int, ...]:
        """Positions of the text that sees the picture."""
        return tuple(range(max(self.image) + 1, self.case.inputs.stop[0]))

    def ablated(self, heads: Sequence[Head], queries: Positions = None, tokens: Positions = None) -> ReplaceImageKV:
        """These heads do not see the picture, or some queries or some of its tokens only."""
        return ReplaceImageKV(tuple(heads), self.baseline, self.before_rope, queries, tokens)

    def over_heads(self, kept: Bool[np.ndarray, "mask head"]) -> Float[np.ndarray, "mask"]:
        """The target with only some heads kept; the others see the baseline."""
        return self.measure([self.ablated(chosen(self.heads, ~own)) for own in kept])

    def over_tokens(self, kept: Bool[np.ndarray, "mask token"]) -> Float[np.ndarray, "mask"]:
        """The target with only some of the picture's tokens kept; for every head the others are the baseline."""
        return self.measure([self.ablated(self.heads, tokens=chosen(self.image, ~own)) for own in kept])


def chosen(units: Sequence[Any], mask: Bool[np.ndarray, "unit"]) -> tuple[Any, ...]:
    """Those where the mask is True."""
    return tuple(unit for unit, here in zip(units, mask, strict=True) if here)


def make_probes(model: Any, cases: Sequence[Case], config: HeadAttributionConfig) -> list[Probe]:
    """One probe for each picture, with the baseline that is asked for."""
    before = config.rope == "before"
    baseline = config.baseline
    if baseline == "dataset":
        baseline = mean_image_kv(model, [case.inputs for case in cases], before)
    return [Probe(model, case, metric_of(case, config.target), baseline, before) for case in cases]
