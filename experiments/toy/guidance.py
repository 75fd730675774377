"""Training only: two read-outs that show a decoder how to find a line's second character.

The first character of an answer is found by the line's key. The later ones can be guessed as what follows the
characters before them; that guess fails for the second one wherever the first stands elsewhere on the page, and by
the answers alone it was never unlearned: the way out has two parts, neither of which helps without the other. So
each is asked for by itself, in texts, of the residual stream that enters the reading layer: at every position that
produces a character, the key that was asked for; at every character of a value, its line's key and its place.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.experiments.toy import data
from hooked_vlm.experiments.toy.batches import IGNORED, Batch
from hooked_vlm.experiments.toy.data import Sample

N_LETTERS = len(data.LETTERS)
Places = Int[np.ndarray, "n 2"]
"""Row and position."""


class Guidance(nn.Module):
    """Linear read-outs of a residual stream."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.asked = nn.Linear(d_model, 2 * N_LETTERS)
        self.context = nn.Linear(d_model, 2 * N_LETTERS + data.VALUE_LENGTH)

    def loss(
        self, samples: Sequence[Sample], batch: Batch, text_start: int, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy of all that is read out of text samples (without echo, with the usual separator).

        ``text_start`` is the position of their first token.
        """
        residual = F.layer_norm(residual, residual.shape[-1:])
        where, keys = asked_keys(samples, batch)
        read = self.asked(residual[where[:, 0], where[:, 1]])
        loss = _letters_loss(read, torch.from_numpy(keys).to(read.device))
        where, keys, places = context_keys(samples, text_start)
        read = self.context(residual[where[:, 0], where[:, 1]])
        loss = loss + _letters_loss(read[:, : 2 * N_LETTERS], torch.from_numpy(keys).to(read.device))
        return loss + F.cross_entropy(read[:, 2 * N_LETTERS :], torch.from_numpy(places).to(read.device))


def _letters_loss(read: Float[Tensor, "n two_letters"], keys: Int[Tensor, "n 2"]) -> Float[Tensor, ""]:
    first, second = read.chunk(2, dim=-1)
    return F.cross_entropy(first, keys[:, 0]) + F.cross_entropy(second, keys[:, 1])


def _numbers(key: str) -> list[int]:
    return [data.LETTERS.index(letter) for letter in key]


def context_lines(sample: Sample) -> list[str]:
    """The lines of a text sample, which stand before its first question."""
    return sample.turns[0][0].split("\n")[:-1]


def asked_keys(samples: Sequence[Sample], batch: Batch) -> tuple[Places, Int[np.ndarray, "n 2"]]:
    """Where answer tokens are produced, and the two letters of the key that was asked for there."""
    labels = batch.labels.cpu().numpy()
    where, keys = [], []
    for row, sample in enumerate(samples):
        lines = context_lines(sample)
        produced = np.flatnonzero(labels[row] != IGNORED) - 1
        for answer, index in zip(produced.reshape(len(sample.turns), -1), sample.target_lines, strict=True):
            where += [(row, position) for position in answer]
            keys += [_numbers(lines[index][:2])] * len(answer)
    return np.array(where), np.array(keys)


def context_keys(
    samples: Sequence[Sample], text_start: int
) -> tuple[Places, Int[np.ndarray, "n 2"], Int[np.ndarray, " n"]]:
    """Where the characters of values stand, the letters of their line's key, and their place in the value."""
    per_line = 2 + 1 + data.VALUE_LENGTH + 1  # tokens: key, separator, value, new line
    where, keys, places = [], [], []
    for row, sample in enumerate(samples):
        for number, line in enumerate(context_lines(sample)):
            for place in range(data.VALUE_LENGTH):
                where.append((row, text_start + number * per_line + 3 + place))
                keys.append(_numbers(line[:2]))
                places.append(place)
    return np.array(where), np.array(keys), np.array(places)
