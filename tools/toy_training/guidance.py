"""Training only: read-outs that show a decoder how to find a line's second character.

The first character of an answer is found by the line's key. The later ones can be guessed as what follows the
characters before them; that guess fails for the second one wherever the first stands elsewhere on the page, and by
the answers alone it was never unlearned: the way out has two parts, neither of which helps without the other. So
each is asked for by itself, of the residual stream that enters the reading layer: at every position that produces a
character, the key that was asked for; where the characters of values stand, their line's key.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.toys import pages as data
from hooked_vlm.toys.pages import Sample
from tools.toy_training.batches import IGNORED, Batch
from tools.toy_training.family import ToyFamily

N_LETTERS = len(data.LETTERS)
CLEAR_SHARE = 0.5  # of a character's area, that an image token must hold to be asked for its line


@dataclass(frozen=True, eq=False)
class Facts:
    """What is to be read out where."""

    rows: Int[np.ndarray, " n"]
    positions: Int[np.ndarray, " n"]
    keys: Int[np.ndarray, "n 2"]
    """Numbers of a key's letters."""

    @classmethod
    def collect(cls, facts: Iterator[tuple[int, int, str]]) -> "Facts":
        """From row, position and key."""
        found = [(row, position, *map(data.LETTERS.index, key)) for row, position, key in facts]
        columns = np.array(found, dtype=np.int64).reshape(-1, 4)
        return cls(columns[:, 0], columns[:, 1], columns[:, 2:])


class Guidance(nn.Module):
    """Linear read-outs of a residual stream."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.asked = nn.Linear(d_model, 2 * N_LETTERS)
        self.context = nn.Linear(d_model, 2 * N_LETTERS)
        self.image = nn.Linear(d_model, 2 * N_LETTERS)

    def loss(
        self,
        family: ToyFamily,
        samples: Sequence[Sample],
        batch: Batch,
        residual: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, ""]:
        """Cross-entropy of all that is read out of texts or of pages (without echo, with the usual separator)."""
        residual = F.layer_norm(residual, residual.shape[-1:])
        if samples[0].task == "text":
            where = _read(self.context, residual, Facts.collect(_in_text(family, samples)))
        else:
            where = _read(self.image, residual, Facts.collect(_in_image(family, samples, batch)))
        return where + _read(self.asked, residual, Facts.collect(_asked(samples, batch)))


def _read(head: nn.Linear, residual: Float[Tensor, "batch pos d_model"], facts: Facts) -> Float[Tensor, ""]:
    first, second = head(residual[facts.rows, facts.positions]).chunk(2, dim=-1)
    keys = torch.from_numpy(facts.keys).to(residual.device)
    return F.cross_entropy(first, keys[:, 0]) + F.cross_entropy(second, keys[:, 1])


def _keys(sample: Sample) -> list[str]:
    """Of the lines of a page, or of the text before the first question."""
    if sample.page is not None:
        return [line.key for line in sample.page.lines]
    return [line[:2] for line in sample.turns[0][0].split("\n")[:-1]]


def _asked(samples: Sequence[Sample], batch: Batch) -> Iterator[tuple[int, int, str]]:
    """Where answers are produced, and the key that was asked for."""
    labels = batch.labels.cpu().numpy()
    for row, sample in enumerate(samples):
        if sample.target_lines:
            keys = _keys(sample)
            producing = (np.flatnonzero(labels[row] != IGNORED) - 1).reshape(len(sample.turns), -1)
            for answer, index in zip(producing, sample.target_lines, strict=True):
                yield from ((row, int(position), keys[index]) for position in answer)


def _in_text(family: ToyFamily, samples: Sequence[Sample]) -> Iterator[tuple[int, int, str]]:
    """Where the characters of values stand in texts, and their line's key."""
    before, after = 2 + 1, 1  # tokens of a key and the separator; of a new line
    for row, sample in enumerate(samples):
        for number, key in enumerate(_keys(sample)):
            start = family.text_start + number * (before + data.VALUE_LENGTH + after) + before
            yield from ((row, position, key) for position in range(start, start + data.VALUE_LENGTH))


def _in_image(family: ToyFamily, samples: Sequence[Sample], batch: Batch) -> Iterator[tuple[int, int, str]]:
    """The image tokens that hold most of a value's character, and its line's key."""
    assert batch.grid is not None
    for row, sample in enumerate(samples):
        for line in sample.page.lines if sample.page is not None else ():
            for box in line.value_boxes:
                tokens = np.flatnonzero(batch.grid.overlaps(box) > CLEAR_SHARE)
                yield from ((row, family.image_start + int(token), line.key) for token in tokens)
