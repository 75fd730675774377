"""Pictures of which it is known what lies where: toy pages and drawings, and any data with named boxes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from hooked_vlm.data.samples import NamedBox, Sample
from hooked_vlm.toys.drawings import OBJECTS
from hooked_vlm.toys.pages import CHARACTERS, make_page, naming_sample, transcription_sample

TOY_LABELS = (*CHARACTERS, *OBJECTS)
MOST = 0.5
"""A token shows a character if more than this share of the character lies in it, and an object if more than this share
of the token lies on it."""


@dataclass(frozen=True, eq=False)
class LabelledPicture:
    """A sample of one picture, the boxes of which are named by what they hold; beside them, a drawn object."""

    sample: Sample
    kind: str
    """Labels are permuted among pictures of one kind only."""
    object_name: str | None = None
    object_mask: Bool[np.ndarray, "height width"] | None = None

    def labels(self, tokens: Float[np.ndarray, "token 4"], names: Sequence[str]) -> Bool[np.ndarray, "token label"]:
        """Which tokens show what.

        Args:
            tokens: (x0, y0, x1, y1) of each in pixels of the picture; NaN for one that stands for no place.
        """
        found = np.zeros((len(tokens), len(names)), dtype=bool)
        for name, box, _ in self.sample.boxes:
            if name in names:
                found[:, names.index(name)] |= _share_of_box(tokens, np.asarray(box, dtype=float)) > MOST
        if self.object_mask is not None and self.object_name in names:
            found[:, names.index(self.object_name)] = _share_on(self.object_mask, tokens) > MOST
        return found

    def frames(self, label: str) -> tuple[tuple[float, ...], ...]:
        """The boxes of a label: of a drawn object the one around its mask."""
        boxes = [tuple(map(float, own.box)) for own in self.sample.boxes if own.name == label]
        if self.object_mask is not None and self.object_name == label and self.object_mask.any():
            rows, columns = np.nonzero(self.object_mask)
            corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            boxes.append(tuple(map(float, corners)))
        return tuple(boxes)


def toy_pictures(n: int, seed: int, purpose: int = 0) -> Iterator[LabelledPicture]:
    """Pages, single lines of text and drawings in turn (two pages to one of each), with their answers.

    Args:
        purpose: pictures of different purposes are drawn independently of each other.
    """
    rng = np.random.default_rng([seed, purpose])
    for number in range(n):
        id = f"{('page', 'page', 'line', 'drawing')[number % 4]} {number}"
        if number % 4 < 2:
            page = make_page(rng)
            asked = int(rng.integers(len(page.lines)))
            named = [
                NamedBox(character, box)
                for line in page.lines
                for word, boxes in ((line.key, line.key_boxes), (line.value, line.value_boxes))
                for character, box in zip(word, boxes, strict=True)
            ]
            prompt, answer, image = page.question(asked), page.lines[asked].value, page.image
            yield LabelledPicture(Sample(id, prompt, [image], named, answer), "page")
        else:
            made = transcription_sample(rng) if number % 4 == 2 else naming_sample(rng)
            ((prompt, answer),) = made.turns
            named = [NamedBox(*pair) for pair in zip(answer, made.char_boxes, strict=True)] if made.char_boxes else []
            sample = Sample(id, prompt, [made.image], named, answer)
            yield LabelledPicture(sample, made.task, answer if made.object_mask is not None else None, made.object_mask)


def boxed_pictures(samples: Iterable[Sample]) -> tuple[list[LabelledPicture], tuple[str, ...]]:
    """Samples of a data set that have one picture each, and the names of their boxes."""
    pictures = [LabelledPicture(sample, "sample") for sample in samples if len(sample.images) == 1]
    return pictures, tuple(sorted({box.name for picture in pictures for box in picture.sample.boxes}))


def _share_of_box(tokens: Float[np.ndarray, "token 4"], box: Float[np.ndarray, "4"]) -> Float[np.ndarray, "token"]:
    """The share of a box that lies in each token."""
    low, high = np.maximum(tokens[:, :2], box[:2]), np.minimum(tokens[:, 2:], box[2:])
    with np.errstate(invalid="ignore"):
        return np.nan_to_num((high - low).clip(0).prod(1)) / max((box[2:] - box[:2]).prod(), 1e-9)


def _share_on(
    mask: Bool[np.ndarray, "height width"], tokens: Float[np.ndarray, "token 4"]
) -> Float[np.ndarray, "token"]:
    """The share of each token that lies on a mask, by the pixels in it."""
    shares = np.zeros(len(tokens))
    for row, box in enumerate(tokens):
        if np.isfinite(box).all():
            x0, y0, x1, y1 = np.rint(box).astype(int)
            own = mask[y0:y1, x0:x1]
            shares[row] = own.mean() if own.size else 0.0
    return shares
