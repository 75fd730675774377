"""Pressure towards few reading heads, applied only after the model reads.

The heads of one layer with the highest OCR scores are chosen once and stay: of the third layer, because two must
come before it, one to gather the question's letters and one to find their line. From then on

- rows that read an image run with some of the other heads switched off at random, so that no single
  one of them is indispensable;
- the other heads pay for attention to a character's image tokens at the position that produces it;
- drawings and texts sometimes run without the reading heads, so that naming does not depend on them.

Nothing is pruned: every head stays in the checkpoint and is trained to the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.toys.pages import Sample
from tools.toy_training.batches import Batch
from tools.toy_training.heads import Head, evidence_mask


@dataclass(frozen=True)
class Specialisation:
    """Strength of the pressure."""

    reading_heads: int = 2
    layer: int = 2  # of the reading heads
    row_share: float = 0.3  # rows in which heads are switched off
    others_off: int = 2  # at most, on rows that read
    naming_without_reading: float = 0.5
    text_off: int = 1  # any heads, at most, on text rows
    penalty: tuple[tuple[int, float], ...] = ((6500, 0.1), (7500, 0.3))
    """(step, weight per unit of attention, summed over heads), straight lines between."""

    def penalty_at(self, step: int) -> float:
        steps, weights = zip(*self.penalty, strict=True)
        return float(np.interp(step, steps, weights))


def top_heads(scores: Float[np.ndarray, "layer head"], layer: int, n: int) -> list[Head]:
    """The `n` heads of a layer with the highest scores."""
    return [(layer, int(head)) for head in np.argsort(-scores[layer], kind="stable")[:n]]


def random_gates(
    rng: np.random.Generator,
    samples: Sequence[Sample],
    shape: tuple[int, int],
    reading: Sequence[Head],
    config: Specialisation,
) -> Float[Tensor, "layer batch head"]:
    """One and zero per row and head: which heads take part."""
    keep = np.ones((len(samples), *shape), np.float32)
    every = [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]
    others = [head for head in every if head not in set(reading)]
    for row, sample in enumerate(samples):
        if sample.task == "naming":
            off = list(reading) if rng.random() < config.naming_without_reading else []
        elif rng.random() >= config.row_share:
            off = []
        else:
            pool, most = (every, config.text_off) if sample.task == "text" else (others, config.others_off)
            off = [pool[i] for i in rng.permutation(len(pool))[: int(rng.integers(1, most + 1))]]
        for layer, head in off:
            keep[row, layer, head] = 0
    return torch.from_numpy(keep).transpose(0, 1)


def attention_on_evidence(
    samples: Sequence[Sample],
    batch: Batch,
    patterns: Sequence[Float[Tensor, "batch head query key"]],
    reading: Sequence[Head],
    image_start: int,
) -> Float[Tensor, ""]:
    """Attention that the other heads pay to a character's image tokens where it is produced.

    Summed over heads, averaged over the characters of all answers; ``image_start`` is the position of the first
    image token.
    """
    evidence = torch.from_numpy(evidence_mask(samples, batch)).to(batch.tokens.device)
    rows, queries = evidence.any(-1).nonzero(as_tuple=True)
    where = evidence[rows, queries].float()
    image = slice(image_start, image_start + where.shape[-1])
    total = torch.zeros((), device=batch.tokens.device)
    for layer, pattern in enumerate(patterns):
        others = [head for head in range(pattern.shape[1]) if (layer, head) not in set(reading)]
        paid = pattern[rows, :, queries][:, others, image]  # character, head, image token
        total = total + torch.einsum("cht,ct->ch", paid, where).sum(1).mean()
    return total
