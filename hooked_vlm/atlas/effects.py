"""Scores of effects on the answer: heads changed alone and in groups, and what they write directly."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float

from hooked_vlm.atlas.attention import Found
from hooked_vlm.atlas.stimuli import Stimulus
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import Head, Intervention, ReplaceImageKV, ZeroHeads
from hooked_vlm.interventions.heads import tower_shape
from hooked_vlm.lens import logit_attribution
from hooked_vlm.metrics import log_prob
from hooked_vlm.sweeps.run import sweep, with_features

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

FEWEST_GROUPS = 64


def default_groups(n_heads: int) -> int:
    """Number of random groups of heads that give each head a coefficient."""
    return max(FEWEST_GROUPS, fewest_groups(n_heads))


def fewest_groups(n_heads: int) -> int:
    """Number of groups from which on coefficients are determined well enough to be given."""
    return 2 * n_heads


@torch.no_grad()
def effect_scores(model: "HookedVLM", stimulus: Stimulus, other: Stimulus | None, groups: int, seed: int) -> Found:
    """Effects of the heads of both towers on the first token of the answer to a stimulus with a picture, by the name of
    the score.

    Args:
        other: a stimulus with another answer, for the null of `direct_logit`.
        groups: number of random groups of heads; 0 leaves `transfer_in_groups` out.

    Raises:
        InputError: a stimulus that the model cannot take.
    """
    inputs = model.as_inputs(replace(stimulus.asked, answer=None).inputs(model))
    encoded, token = with_features(model, inputs), first_token(model, stimulus)
    shape, tower = tower_shape(model, "language")[:2], tower_shape(model, "vision")[:2]
    found: Found = {}
    heads = _heads(shape)
    kept = group_masks(groups, len(heads), seed, stimulus)
    dropped = [tuple(head for head, keep in zip(heads, own, strict=True) if not keep) for own in kept]
    runs = [ReplaceImageKV(own) for own in [*((head,) for head in heads), *dropped]]
    alone, together = np.split(_effects(model, encoded, token, runs), [len(heads)])
    found["transfer"] = -alone.reshape(shape), np.zeros(shape)
    if groups:
        found["transfer_in_groups"] = coefficients(kept, together).reshape(shape), np.zeros(shape)
    direct = _direct(model, encoded, token)
    null = np.full(shape, np.nan) if other is None else _direct(model, encoded, first_token(model, other))
    found["direct_logit"] = direct, null
    zeroed = [ZeroHeads((head,), tower="vision") for head in _heads(tower)]
    found["answer_without"] = -_effects(model, inputs, token, zeroed).reshape(tower), np.zeros(tower)
    return found


def first_token(model: "HookedVLM", stimulus: Stimulus) -> int:
    """The first token of the answer, as `VLMInputs.append` encodes it."""
    return model.input_spec().encode(stimulus.asked.answer or "")[0]


def group_masks(n: int, n_heads: int, seed: int, stimulus: Stimulus) -> Bool[np.ndarray, "mask head"]:
    """Heads that are kept, each with probability 1/2, independently.

    Others for each stimulus: what the interactions of heads add to a coefficient depends on the masks, and would be no
    error that averages out over stimuli if these shared them.
    """
    rng = np.random.default_rng([seed, 34, int(stimulus.digest(), 16)])
    return rng.random((n, n_heads)) < 0.5


def _heads(shape: tuple[int, int]) -> list[Head]:
    return [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]


def _effects(
    model: "HookedVLM", inputs: VLMInputs, token: int, interventions: Sequence[Intervention]
) -> Float[np.ndarray, "run"]:
    """Changes of the log-probability of the answer's first token."""
    return sweep(model, inputs, interventions, log_prob(token)).effects[:, 0].double().numpy()


def coefficients(kept: Bool[np.ndarray, "mask head"], values: Float[np.ndarray, "mask"]) -> Float[np.ndarray, "head"]:
    """Least-squares coefficients of keeping each head, beside an intercept."""
    design = np.column_stack((np.ones(len(kept)), kept))
    return np.linalg.lstsq(design, values, rcond=None)[0][1:]


def _direct(model: "HookedVLM", inputs: VLMInputs, token: int) -> Float[np.ndarray, "layer head"]:
    """What each head adds directly to a logit of the last token."""
    parts = logit_attribution(model, inputs, token, unit="head")
    values = dict(zip(parts.labels, parts.values[:, 0], strict=True))
    n_layers, n_heads = tower_shape(model, "language")[:2]
    return np.array([[values[f"L{layer}H{head}"] for head in range(n_heads)] for layer in range(n_layers)])
