"""The control that makes it science: top-scoring heads masked, against as many random ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from hooked_vlm.experiments.ocr_heads.config import OcrHeadsConfig
from hooked_vlm.experiments.ocr_heads.examples import Example, batches, prompt_length, to_inputs
from hooked_vlm.experiments.ocr_heads.published import ranked
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.interventions import Head, ZeroHeads

LIVE_SHARE = 0.1
"""A head is live if its mean output norm is at least this share of the largest."""


@dataclass(frozen=True)
class Outcome:
    """One task under one mask."""

    condition: str
    """One of "none", "top" and "random"."""
    draw: int
    heads: tuple[Head, ...]
    task: str
    right: int
    n: int

    @property
    def exact(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.n)


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927)."""
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def n_to_mask(config: OcrHeadsConfig, n_heads: int) -> int:
    """As set; by default an eighth of the heads, at most the paper's 10."""
    return config.mask_heads or max(1, min(10, n_heads // 8))


def random_candidates(
    scores: Float[np.ndarray, "layer head"], norms: Float[np.ndarray, "layer head"], top: Sequence[Head]
) -> list[Head]:
    """Heads to draw the random control from: live, scoring below 0.1, not among the masked ones."""
    live = norms >= LIVE_SHARE * norms.max()
    return [(int(a), int(b)) for a, b in np.argwhere(live & (scores < 0.1)) if (a, b) not in set(top)]


def masking_control(
    model: Any,
    tasks: Mapping[str, Sequence[Example]],
    scores: Float[np.ndarray, "layer head"],
    norms: Float[np.ndarray, "layer head"],
    config: OcrHeadsConfig,
    pixels: int | None,
) -> list[Outcome]:
    """Every task with nothing masked, with the top heads masked, and with random heads masked.

    Heads are zeroed at all positions and all steps (the paper's masking). Images are encoded once.
    """
    k = n_to_mask(config, scores.size)
    top = tuple(ranked(scores)[:k])
    candidates = random_candidates(scores, norms, top)
    rng = np.random.default_rng([config.seed, 4])
    conditions: list[tuple[str, int, tuple[Head, ...]]] = [("none", 0, ()), ("top", 0, top)]
    if len(candidates) >= k:
        for draw in range(config.draws):
            chosen = rng.choice(len(candidates), size=k, replace=False)
            conditions.append(("random", draw, tuple(candidates[i] for i in sorted(chosen))))
    prepared = {task: _prepare(model, examples, config, pixels) for task, examples in tasks.items()}
    runs = [(c, task) for c in conditions for task in tasks]
    outcomes = []
    for (condition, draw, heads), task in tqdm(runs, desc="masking heads", unit="run", disable=config.quiet):
        right = sum(_count_right(model, inputs, own, heads, config) for inputs, own in prepared[task])
        outcomes.append(Outcome(condition, draw, heads, task, right, len(tasks[task])))
    return outcomes


Prepared = list[tuple[VLMInputs, list[Example]]]


def _prepare(model: Any, examples: Sequence[Example], config: OcrHeadsConfig, pixels: int | None) -> Prepared:
    """Batches with their images encoded: every condition reuses them."""
    lengths = [prompt_length(model, e, pixels) + config.new_tokens for e in examples]
    prepared = []
    for group in batches(lengths, config.tokens_per_batch):
        own = [examples[i] for i in group]
        inputs = to_inputs(model, own, pixels)
        if inputs.has_visuals:
            features = model.encode_images(inputs).detach()
            # the features stand in for the pixels, which are fifty times as large
            inputs = replace(inputs.with_image_features(features), pixel_values=None)
        prepared.append((inputs, own))
    return prepared


def _count_right(
    model: Any,
    inputs: VLMInputs,
    examples: Sequence[Example],
    heads: tuple[Head, ...],
    config: OcrHeadsConfig,
) -> int:
    replies = model.generate(
        inputs, config.new_tokens, fwd_hooks=ZeroHeads(heads).hooks(model, inputs), return_type="str"
    )
    replies = [replies] if isinstance(replies, str) else replies
    return sum(e.is_right(reply) for e, reply in zip(examples, replies, strict=True))
