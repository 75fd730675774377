"""Pictures of COCO with a single annotated object of a fair size: an annotation file and a folder of pictures."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

from hooked_vlm.experiments.common.errors import StudyError
from hooked_vlm.experiments.head_attribution.items import Item
from hooked_vlm.images import load_image


def single_objects(
    content: Mapping[str, Any], min_object: float, max_object: float
) -> list[tuple[Mapping[str, Any], Mapping[str, Any], str]]:
    """(image, annotation, name) of pictures with one annotation only, whose object covers a fair share of the area.

    A crowd is more than one object.
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
            chosen.append((image, own[0], names[own[0]["category_id"]]))
    return chosen


def coco_items(
    annotations: Path, images: Path, question: str, n: int, seed: int, min_object: float, max_object: float
) -> list[Item]:
    """`n` pictures drawn from those that fit, or all if there are fewer; objects without outline have no mask.

    Raises:
        StudyError: the file is no annotation file, or no picture fits.
        ImageError: a picture is missing or corrupt.
    """
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        chosen = single_objects(content, min_object, max_object)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{annotations} is no COCO annotation file (instances_*.json): {error!r}") from error
    if not chosen:
        raise StudyError(
            f"no picture in {annotations} has a single object that covers {min_object:.0%} to {max_object:.0%} of it"
        )
    order = np.random.default_rng([seed, 1]).permutation(len(chosen))[:n]
    items = []
    for image, annotation, name in (chosen[i] for i in order):
        picture = load_image(images / image["file_name"])
        if picture.size != (image["width"], image["height"]):
            raise StudyError(
                f"{image['file_name']} is {picture.size[0]} x {picture.size[1]} pixels, but its annotation says "
                f"{image['width']} x {image['height']}: these are not the annotated pictures"
            )
        outline = annotation.get("segmentation")
        # run lengths are for crowds; some files have boxes only
        mask = object_mask(outline, picture.size) if outline and isinstance(outline, list) else None
        items.append(Item(picture, name, question, mask))
    return items


def object_mask(polygons: Sequence[Sequence[int | float]], size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """The pixels inside of any of the polygons, each a list x, y, x, y, ..."""
    mask = Image.new("1", size)
    draw = ImageDraw.Draw(mask)
    for polygon in polygons:
        draw.polygon(list(zip(polygon[::2], polygon[1::2], strict=True)), fill=1)
    return np.array(mask)
