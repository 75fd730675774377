"""Whether two pictures look alike, by several measures, each taken twice.

A measure of appearance with noise leaves some of the appearance uncontrolled, and what is left would count for the
name. So every measure is taken of a second look at each picture, too (a little crop and noise); the correlation between
both is its reliability, and correlations are corrected by it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image

from hooked_vlm.experiments.head_attribution.items import Item
from hooked_vlm.experiments.head_attribution.tasks import Case, to_inputs
from hooked_vlm.model.vlm import HookedVLM

Square = Float[np.ndarray, "image image"]
Vectors = Float[np.ndarray, "image d"]
CROP, NOISE = 0.06, 6.0
"""Largest share of a side that a second look cuts off, and the deviation of its noise (of 255)."""
SIDE = 24
"""Pixels per side of outlines and of pictures that are compared pixel by pixel."""


@dataclass(frozen=True, eq=False)
class Looks:
    """Similarity of pictures by one measure, from the pictures and from second looks at them."""

    first: Square
    second: Square


def looks_of(cases: Sequence[Case], model: HookedVLM, seed: int) -> dict[str, Looks]:
    """Similarity of pictures by measure; measures that these pictures do not have are left out.

    - outline: the object's mask, cropped to the object and scaled (where its location is known)
    - pixels: the picture, scaled
    - image tokens: image features, token by token (where all pictures have as many)
    - mean features: their mean over tokens

    All are centred over pictures and compared by cosines.
    """
    first = [case.item for case in cases]
    second = [second_look(item, [seed, 31, i]) for i, item in enumerate(first)]
    given = [case.inputs.image_features for case in cases]
    own = [
        _encoded(model, item) if known is None else _features(known) for item, known in zip(first, given, strict=True)
    ]
    features = [own, [_encoded(model, item) for item in second]]
    found: dict[str, tuple[Vectors | None, Vectors | None]] = {
        "outline": (_stacked(first, outline), _stacked(second, outline)),
        "pixels": (_stacked(first, pixels), _stacked(second, pixels)),
        "image tokens": (_tokens(features[0]), _tokens(features[1])),
        "mean features": (_means(features[0]), _means(features[1])),
    }
    return {
        name: Looks(centred_cosine(a), centred_cosine(b))
        for name, (a, b) in found.items()
        if a is not None and b is not None
    }


def cosine(vectors: Vectors) -> Square:
    """Cosine similarity between rows; 0 with a row of zeros."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
    return unit @ unit.T


def centred_cosine(vectors: Vectors) -> Square:
    """Cosine between rows less their mean."""
    return cosine(vectors - vectors.mean(0))


def second_look(item: Item, seed: list[int]) -> Item:
    """The same object with a little cut off at each side, scaled back, with noise."""
    rng = np.random.default_rng(seed)
    width, height = item.image.size
    left, right, top, bottom = rng.uniform(0, CROP, 4)
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    picture = np.asarray(item.image.resize((width, height), Image.Resampling.BILINEAR, box=box), dtype=float)
    noisy = (picture + rng.normal(0, NOISE, picture.shape)).clip(0, 255).astype(np.uint8)
    mask = item.object_mask
    if mask is not None:
        scaled = Image.fromarray(mask.astype(np.uint8) * 255)
        scaled = scaled.resize((width, height), Image.Resampling.BILINEAR, box=box)
        mask = np.asarray(scaled) > 127
    return Item(Image.fromarray(noisy), item.name, item.question, mask)


def outline(item: Item) -> Float[np.ndarray, "pixel"] | None:
    """The object's mask, cropped to the object and scaled; None where its location is unknown."""
    mask = item.object_mask
    if mask is None or not mask.any():
        return None
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return _scaled(Image.fromarray(cut.astype(np.uint8) * 255))


def pixels(item: Item) -> Float[np.ndarray, "pixel"]:
    """The picture, scaled."""
    return _scaled(item.image)


def _scaled(image: Image.Image) -> Float[np.ndarray, "pixel"]:
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=float).ravel()


def _stacked(items: Sequence[Item], measure: Callable[[Item], np.ndarray | None]) -> Vectors | None:
    each = [measure(item) for item in items]
    known = [one for one in each if one is not None]
    return np.stack(known) if len(known) == len(each) else None


@torch.no_grad()
def _encoded(model: HookedVLM, item: Item) -> Float[np.ndarray, "token d"]:
    return _features(model.encode_images(to_inputs(model, item)))


def _features(features: torch.Tensor) -> Float[np.ndarray, "token d"]:
    """What enters the stream at each token, with DeepStack at all its places."""
    return features.flatten(1).float().cpu().numpy().astype(float)


def _tokens(features: Sequence[Float[np.ndarray, "_ _"]]) -> Vectors | None:
    return np.stack([own.ravel() for own in features]) if len({own.shape for own in features}) == 1 else None


def _means(features: Sequence[Float[np.ndarray, "_ _"]]) -> Vectors:
    return np.stack([own.mean(0) for own in features])


# ---------------------------------------------------------------- correlations corrected for noise


def corrected_partial(
    similarity: Square, cause: Square, looks: Looks, used: Bool[np.ndarray, "image"]
) -> tuple[float, float]:
    """Partial correlation over pairs of pictures of the similarity with a cause, controlled for appearance, corrected
    for the noise of its measure; and the reliability of the measure.

    Correlations with the measure are means over both looks and divided by the square root of the reliability (Spearman
    1904). NaN where the measure is all noise or the correction leaves no variance.
    """
    i, j = np.triu_indices(len(similarity), 1)
    pairs = used[i] & used[j]
    i, j = i[pairs], j[pairs]
    columns = np.stack([square[i, j] for square in (similarity, cause, looks.first, looks.second)])
    if columns.shape[1] < 4 or (columns.std(1) < 1e-9).any():
        return np.nan, np.nan
    correlation = np.corrcoef(columns)
    reliability = float(correlation[2, 3])
    if reliability <= 0:
        return np.nan, reliability
    with_looks = correlation[:2, 2:].mean(1) / np.sqrt(reliability)
    left = (1 - with_looks**2).prod()
    if (np.abs(with_looks) >= 1).any() or left <= 0:
        return np.nan, reliability
    return float((correlation[0, 1] - with_looks.prod()) / np.sqrt(left)), reliability
