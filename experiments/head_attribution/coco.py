"""COCO pictures with a single annotated object, from an annotation file and a folder of pictures."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.head_attribution.items import Item
from hooked_vlm.inputs.images import load_image

MALFORMED = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""Exceptions raised by reading JSON of an unexpected structure."""


def single_objects(
    content: Mapping[str, Any], min_object: float, max_object: float
) -> list[tuple[Mapping[str, Any], Mapping[str, Any], str]]:
    """Select pictures with one annotation whose object covers `min_object` to `max_object` of the area.

    A crowd counts as several objects.

    Returns:
        (image, annotation, name) of each picture.
    """
    names = {category["id"]: category["name"] for category in content["categories"]}
    by_image: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    chosen = []
    for image in content["images"]:
        own = by_image[image["id"]]
        if len(own) != 1 or own[0].get("iscrowd"):
            continue
        if min_object <= own[0]["area"] / (image["width"] * image["height"]) <= max_object:
            chosen.append((image, own[0], str(names[own[0]["category_id"]])))
    return chosen


def coco_items(
    annotations: Path, images: Path, question: str, n: int, seed: int, min_object: float, max_object: float
) -> list[Item]:
    """Draw `n` of the pictures that fit, or all if there are fewer; an object without an outline has no mask.

    Raises:
        StudyError: not an annotation file, not the annotations of these pictures, or no picture fits.
        ImageError: a picture is missing or corrupt.
    """
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        chosen = single_objects(content, min_object, max_object)
    except MALFORMED as error:
        raise StudyError(f"{annotations} is not a COCO annotation file (instances_*.json): {error!r}") from error
    if not chosen:
        raise StudyError(
            f"no picture in {annotations} has a single object that covers {min_object:.0%} to {max_object:.0%} of it"
        )
    order = np.random.default_rng([seed, 1]).permutation(len(chosen))[:n]
    return [_item(images, *chosen[int(i)], question) for i in order]


def _item(images: Path, image: Mapping[str, Any], annotation: Mapping[str, Any], name: str, question: str) -> Item:
    file = image.get("file_name")
    if not isinstance(file, str):
        raise StudyError(f"picture {image['id']!r} of the annotation file has no file_name")
    picture = load_image(images / file)
    if picture.size != (image["width"], image["height"]):
        raise StudyError(
            f"{file} is {picture.size[0]} x {picture.size[1]} pixels, but its annotation says "
            f"{image['width']} x {image['height']}: these are not the annotated pictures"
        )
    outline = annotation.get("segmentation")
    try:
        # run-length masks are for crowds; some files have boxes only
        mask = object_mask(outline, picture.size) if outline and isinstance(outline, list) else None
    except MALFORMED as error:
        raise StudyError(f"the outline of the object in {file} is not a list of polygons: {error!r}") from error
    return Item(picture, name, question, mask)


def object_mask(polygons: Sequence[Sequence[int | float]], size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """Pixels inside any of the polygons, each a list x, y, x, y, ..."""
    mask = Image.new("1", size)
    draw = ImageDraw.Draw(mask)
    for polygon in polygons:
        draw.polygon(list(zip(polygon[::2], polygon[1::2], strict=True)), fill=1)
    return np.array(mask)
