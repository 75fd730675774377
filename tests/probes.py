"""Drawn objects that the bundled models are asked about, as the head-attribution study probes them."""

from functools import lru_cache
from typing import Any

import torch
from families import bundled

from hooked_vlm.experiments.head_attribution.ablation import Probe, metric_of
from hooked_vlm.experiments.head_attribution.tasks import Case, toy_items
from hooked_vlm.interventions import ReplaceImageKV
from hooked_vlm.toys.pages import NAMING_PROMPT


def toy_case(name: str, index: int) -> Case:
    """One of the drawn objects."""
    model, item = bundled(name), toy_items(index + 1, 0, NAMING_PROMPT)[index]
    inputs = model.to_inputs(item.question, images=item.image)
    inputs = inputs.with_image_features(model.encode_images(inputs).detach())
    return Case(item, inputs, model.to_single_token(item.name), model.to_single_token("moon"))


@lru_cache
def probe_of(name: str, **changes: Any) -> Probe:
    """One drawn star."""
    case = toy_case(name, 3)
    return Probe(bundled(name), case, metric_of(case, "logit"), **changes)


def value_under(probe: Probe, hooks: list) -> float:
    """The target's logit in a pass of its own."""
    with torch.no_grad():
        logits = probe.model.run_with_hooks(probe.case.inputs, fwd_hooks=hooks)
    return float(logits[0, -1, probe.case.target])


def ablation(probe: Probe, heads: Any) -> list:
    """Hooks that hide the image from heads."""
    return ReplaceImageKV(tuple(heads)).hooks(probe.model, probe.case.inputs)
