"""Head ablation: the target when heads do not see the image (arXiv 2509.17588), or when heads of the vision tower
write a baseline."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.head_attribution.config import HeadAttributionConfig, Target
from hooked_vlm.experiments.head_attribution.tasks import Case
from hooked_vlm.interventions import (
    Head,
    ImageMeans,
    Intervention,
    MeanHeads,
    ReplaceImageKV,
    ZeroHeads,
    mean_head_outputs,
    mean_image_kv,
)
from hooked_vlm.interventions.attention import all_heads
from hooked_vlm.interventions.base import Positions, Tower
from hooked_vlm.interventions.heads import tower_shape
from hooked_vlm.metrics import Metric, log_prob, logit, logit_difference, margin
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.sweeps.run import sweep

Baseline = Literal["mean", "zero", "knockout"] | ImageMeans | Tensor
"""What an ablated head sees in place of the image's keys and values; in the vision tower what it writes, "zero" or
means [layer, head, d_head]."""


def metric_of(case: Case, target: Target) -> Metric:
    """Metric of the answer's first token.

    Raises:
        StudyError: `target` is "difference" and there is no other answer to compare with.
    """
    if target == "difference":
        if case.foil is None:
            raise StudyError("--target difference needs pictures with different names: all answers here are the same")
        return logit_difference(case.target, case.foil)
    return {"logit": logit, "log_prob": log_prob, "margin": margin}[target](case.target)


@dataclass(frozen=True, eq=False)
class Probe:
    """One picture, and its target when heads do not see the image, or those of the vision tower write a baseline.

    Heads are numbered layer by layer; a set of heads is a mask over these numbers, True for kept.
    """

    model: HookedVLM
    case: Case
    metric: Metric
    baseline: Baseline = "mean"
    before_rope: bool = True
    tower: Tower = "language"

    def portable(self) -> tuple[Case, Metric, Baseline, bool, Tower]:
        """All but the model, on the CPU: arguments of `probe_on`."""
        case = replace(self.case, inputs=self.case.inputs.portable())
        return case, self.metric, _to(self.baseline, "cpu"), self.before_rope, self.tower

    @cached_property
    def heads(self) -> tuple[Head, ...]:
        return all_heads(self.model, tower=self.tower)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of layers, and of heads in each."""
        return tower_shape(self.model, self.tower)[:2]

    def measure(self, runs: Sequence[Intervention]) -> Float[np.ndarray, "run"]:
        """Target under each intervention, in one sweep."""
        result = sweep(self.model, self.case.inputs, runs, self.metric)
        return result.values[:, 0].double().numpy()

    @cached_property
    def ends(self) -> tuple[float, float]:
        """Target with all heads, and with all heads ablated for all text."""
        full, none = self.measure([self.ablated(()), self.ablated(self.heads)])
        return float(full), float(none)

    @cached_property
    def image(self) -> tuple[int, ...]:
        """Positions of the image tokens."""
        return tuple(self.case.inputs.positions.image[0].tolist())

    @cached_property
    def text(self) -> tuple[int, ...]:
        """Positions of the text behind the image."""
        return tuple(range(max(self.image) + 1, self.case.inputs.stop[0]))

    def ablated(self, heads: Sequence[Head], queries: Positions = None, tokens: Positions = None) -> Intervention:
        """Ablate the image for some heads, optionally for some queries or image tokens only; in the vision tower the
        heads' outputs at all patches."""
        if isinstance(self.baseline, Tensor):
            return MeanHeads(tuple(heads), self.baseline, tower=self.tower)
        if self.tower == "vision":
            return ZeroHeads(tuple(heads), tower=self.tower)
        return ReplaceImageKV(tuple(heads), self.baseline, self.before_rope, queries, tokens)

    def over_heads(self, kept: Bool[np.ndarray, "mask head"]) -> Float[np.ndarray, "mask"]:
        """Target with only some heads kept; the others see the baseline."""
        return self.measure([self.ablated(chosen(self.heads, ~own)) for own in kept])

    def over_tokens(self, kept: Bool[np.ndarray, "mask token"]) -> Float[np.ndarray, "mask"]:
        """Target with only some image tokens kept; every head sees the baseline in place of the others."""
        return self.measure([self.ablated(self.heads, tokens=chosen(self.image, ~own)) for own in kept])


def probe_on(
    model: HookedVLM, case: Case, metric: Metric, baseline: Baseline, before_rope: bool, tower: Tower
) -> Probe:
    """Rebuild a probe on a worker's replica of the model, from `Probe.portable`."""
    case = replace(case, inputs=model.as_inputs(case.inputs))
    return Probe(model, case, metric, _to(baseline, model.cfg.device), before_rope, tower)


def _to(baseline: Baseline, device: torch.device | str) -> Baseline:
    if isinstance(baseline, Tensor):
        return baseline.to(device)
    if not isinstance(baseline, ImageMeans):
        return baseline
    return replace(baseline, keys=baseline.keys.to(device), values=baseline.values.to(device))


def chosen(units: Sequence[Any], mask: Bool[np.ndarray, "unit"]) -> tuple[Any, ...]:
    """Select the units where the mask is True."""
    return tuple(unit for unit, here in zip(units, mask, strict=True) if here)


def make_probes(model: HookedVLM, cases: Sequence[Case], config: HeadAttributionConfig) -> list[Probe]:
    """One probe per picture, with the configured baseline."""
    if config.tower == "vision":
        return _vision_probes(model, cases, config)
    before = config.rope == "before"
    baseline = config.baseline
    if baseline == "dataset":
        baseline = mean_image_kv(model, [case.inputs for case in cases], before)
    return [Probe(model, case, metric_of(case, config.target), baseline, before) for case in cases]


def _vision_probes(model: HookedVLM, cases: Sequence[Case], config: HeadAttributionConfig) -> list[Probe]:
    """Probes of the vision tower's heads: means are those of the run without ablation."""
    baselines: list[Baseline] = ["zero"] * len(cases)
    if config.baseline == "dataset":
        baselines = [mean_head_outputs(model, [case.inputs for case in cases], tower="vision")] * len(cases)
    if config.baseline == "mean":
        baselines = [mean_head_outputs(model, [case.inputs], tower="vision") for case in cases]
    return [
        Probe(model, case, metric_of(case, config.target), baseline, tower="vision")
        for case, baseline in zip(cases, baselines, strict=True)
    ]
