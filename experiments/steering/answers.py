"""Answers with and without a steering vector, and with random vectors of the same norm."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from hooked_vlm.analysis.statistics import Estimate, paired_change, share
from hooked_vlm.experiments.steering.config import SteerConfig
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import AddVector
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.runtime.progress import Progress
from hooked_vlm.steering import SteeringVectors

UNSTEERED = "unsteered"


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt that is asked with and without steering."""

    name: str
    text: str
    picture: Any
    """Its first picture as an array or PIL image, None without one."""
    inputs: VLMInputs


def scaled(scale: float) -> str:
    """Column of steered answers."""
    return f"× {scale:g}"


def random_at(scale: float) -> str:
    """Column of answers with a random vector of the same norm."""
    return f"random × {scale:g}"


def steered_answers(
    model: HookedVLM, vectors: SteeringVectors, questions: Sequence[Question], config: SteerConfig
) -> pd.DataFrame:
    """Greedy answers: unsteered, at every scale, and at every scale with a random vector drawn for the question."""
    rows = []
    with Progress("answers", "prompt", len(questions), quiet=config.quiet) as bar:
        for number, one in enumerate(questions):
            rows.append(_row(model, vectors, one, number, config))
            bar.update()
    return pd.DataFrame(rows)


def _row(
    model: HookedVLM, vectors: SteeringVectors, question: Question, number: int, config: SteerConfig
) -> dict[str, str]:
    inputs = question.inputs
    row = {"id": question.name, "prompt": question.text, UNSTEERED: _answer(model, inputs, None, config)}
    for scale in config.scales:
        steer = vectors.at(vectors.best, scale, config.at)
        control = vectors.control(vectors.best, _draw(config.seed, number), scale, config.at)
        row[scaled(scale)] = _answer(model, inputs, steer, config)
        row[random_at(scale)] = _answer(model, inputs, control, config)
    return row


def changes(answers: pd.DataFrame, scales: Sequence[float]) -> pd.DataFrame:
    """Share of answers that differ from the unsteered one, by scale: steered, random, and the paired difference."""
    rows = []
    for scale in scales:
        ours, random = (_changed(answers, name) for name in (scaled(scale), random_at(scale)))
        more = paired_change(random.astype(float), ours.astype(float))
        rows.append(
            {
                "scale": scale, **_ends("changed", share(int(ours.sum()), len(ours))),
                **_ends("random vector", share(int(random.sum()), len(random))), **_ends("difference", more),
                "n prompts": len(answers),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _changed(answers: pd.DataFrame, column: str) -> Bool[np.ndarray, "prompt"]:
    return (answers[column] != answers[UNSTEERED]).to_numpy()


def _ends(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}, low": estimate.low, f"{name}, high": estimate.high}


def _answer(model: HookedVLM, inputs: VLMInputs, steer: AddVector | None, config: SteerConfig) -> str:
    hooks = [] if steer is None else steer.hooks(model, inputs)
    return str(model.generate(inputs, config.max_new_tokens, fwd_hooks=hooks, return_type="str"))


def _draw(seed: int, number: int) -> int:
    """Seed of the random vector of one prompt: distinct draws."""
    return int(np.random.default_rng([seed, 32, number]).integers(2**62))
