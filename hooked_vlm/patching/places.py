"""Positions of the decoder and patches of the vision tower, by names of places."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.boxes import Part
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import Positions, Tower, n_patches, position_table
from hooked_vlm.patching.pairs import Direction, Pair, Place, Region, same_columns, same_places

Where = str | int | Sequence[str | int]
"""Names of places: groups ("image", "question", "assistant_header", "final", "text", "generated"), "all", places of the
pair; numbers of positions of the inputs that are run (vision tower: of patches); or "each", each one by itself.
The vision tower has "image" (all patches) and places that are regions."""
Rows = tuple[tuple[int, ...], ...]
"""Positions of each row; patches of each image or tile."""


def place_names(pairs: Sequence[Pair], where: Where, tower: Tower, direction: Direction) -> tuple[str | int, ...]:
    """The places of a sweep; positions and patches are named by their numbers.

    Raises:
        InputError: "each" of examples whose positions or patches do not correspond.
    """
    if where != "each":
        return (where,) if isinstance(where, str | int) else tuple(where)
    sides = [pair.sides(direction)[0] for pair in pairs]
    if tower == "vision":
        if any(len(inputs) > 1 for inputs in sides):
            raise InputError(
                "a patch is one row's: make a pair of each row (clean[i], corrupt[i]) to patch each of them"
            )
        _check_same_pictures(sides)
        counts = n_patches(sides[0])
        width = max(counts, default=0)
        return tuple(image * width + patch for image, own in enumerate(counts) for patch in range(own))
    widths = sorted({inputs.shape[1] for inputs in sides})
    if len(widths) > 1 or any(max(s.first) or min(s.stop) != s.shape[1] for s in sides):
        raise InputError(
            f"the examples have {' and '.join(map(str, widths))} positions, padding included: those of one length can "
            'be patched position by position, others by groups ("image", "question", "final", regions, ...)'
        )
    for inputs in sides:
        for row in range(len(inputs)):
            if not same_columns(sides[0], 0, inputs, row):
                raise InputError(
                    "the examples have images of several sizes, or at several positions, so that a position is not one "
                    'place in all of them: patch groups ("image", "question", "final", regions, ...), or one example'
                )
    matched = torch.cat([pair.matches(direction) for pair in pairs]) >= 0
    return tuple(int(p) for p in matched.all(0).nonzero()[:, 0])


def _check_same_pictures(sides: Sequence[VLMInputs]) -> None:
    """Refuse inputs in which a patch is not the same region of the picture in all of them."""
    first = sides[0].in_feature_order
    for inputs in sides[1:]:
        own = inputs.in_feature_order
        alike = len(own) == len(first) and all(
            same_places(sides[0], v, inputs, w) for v, w in zip(first, own, strict=True)
        )
        if not alike:
            raise InputError(
                f"the examples have images of {sides[0].grids} and {inputs.grids} (frames or tiles, rows, columns of "
                "patches), or tiles that lie otherwise: those of one size can be patched patch by patch, others by "
                'regions (Pair(..., places={"name": Region(box)}))'
            )


def positions_at(pair: Pair, place: str | int, direction: Direction, matches: Int[Tensor, "batch pos"]) -> Rows:
    """The positions of a place in the inputs that are run, row by row; `matches` are `pair.matches(direction)`.

    Raises:
        InputError: an unknown name, a row without such positions, or positions that nothing corresponds to.
    """
    base, source = pair.sides(direction)
    rows = _rows((place,), base) if isinstance(place, int) else _on_base(pair, place, direction, matches)
    for row, own in enumerate(rows):
        if not own:
            raise InputError(f"row {row} has no {place} positions")
        lost = [p for p in own if matches[row, p] < 0]
        if lost:
            n = [_n_of(inputs, row, place) for inputs in (base, source)]
            raise InputError(
                f"position {lost[0]} of row {row} ({place}) corresponds to no position of the other inputs"
                f"{'' if None in n else f': the place has {n[0]} positions in one and {n[1]} in the other'}. Give both "
                "the same number of tokens there, or patch other places"
            )
    return rows


def _on_base(pair: Pair, place: str, direction: Direction, matches: Int[Tensor, "batch pos"]) -> Rows:
    """Return the positions of a place, or of a sum of places, in the inputs that are run."""
    if place not in pair.places and "+" in place:
        return _union([_on_base(pair, part.strip(), direction, matches) for part in place.split("+")])
    if place not in pair.places or direction != "denoising":
        return positions_in(pair.sides(direction)[0], place, pair.places)
    on_clean = positions_in(pair.clean, place, pair.places)  # where places are given
    corresponding = zip(matches.tolist(), on_clean, strict=True)
    return tuple(tuple(p for p, other in enumerate(row) if other in own) for row, own in corresponding)


def _union(parts: Sequence[Rows]) -> Rows:
    return tuple(tuple(sorted(set().union(*rows))) for rows in zip(*parts, strict=True))


def _n_of(inputs: VLMInputs, row: int, place: str | int) -> int | None:
    groups = vars(inputs.positions)
    return len(groups[place][row]) if place in groups else None


def positions_in(inputs: VLMInputs, place: str, places: Mapping[str, Place]) -> Rows:
    """The positions of a place, a group or one of `places`, or of a sum of them ("final+generated"), row by row.

    Raises:
        InputError: an unknown name.
    """
    if place not in places and "+" in place:
        return _union([positions_in(inputs, part.strip(), places) for part in place.split("+")])
    if place not in places:
        return _rows(group(inputs, place, places), inputs)
    regions = _regions(places[place])
    if not regions:
        return _rows(tuple(int(p) for p in places[place]), inputs)  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
    rows: list[set[int]] = [set() for _ in range(len(inputs))]
    for region in regions:
        tokens = inputs.tokens_in_box(region.image, region.box, region.min_overlap, region.part)
        rows[inputs.row_of_image(region.image)].update(tokens)
    return tuple(tuple(sorted(own)) for own in rows)


def _rows(where: Positions, inputs: VLMInputs) -> Rows:
    return tuple(tuple(own.nonzero()[:, 0].tolist()) for own in position_table(where, inputs)[:, :-1])


def group(inputs: VLMInputs, place: str, places: Mapping[str, Place]) -> str | None:
    """The name of a group as interventions use it.

    Raises:
        InputError: there is no such group, nor such a place.
    """
    known = ["all", "text", *vars(inputs.positions)]
    if place == "each":
        raise InputError('"each" position by itself is a sweep of its own: patch(..., where="each")')
    if place not in known:
        raise InputError(f"there is no place {place!r}: choose from {', '.join([*known, *places])}")
    return None if place == "all" else place


def _regions(given: Place) -> list[Region]:
    return [given] if isinstance(given, Region) else [r for r in given if isinstance(r, Region)]


# ---------------------------------------------------------------- the vision tower


def patches_at(pair: Pair, place: str | int) -> Rows:
    """The patches of a place in the vision tower's tensors, image by image.

    Raises:
        InputError: an unknown name, or a place that is no region.
    """
    inputs = pair.clean
    counts = n_patches(inputs)
    if isinstance(place, int):
        image, patch = divmod(place, max(counts))
        if not 0 <= image < len(counts) or patch >= counts[image]:
            raise InputError(
                f"there is no patch {place}: the images have {', '.join(map(str, counts))}, each counted from a "
                f"multiple of {max(counts)}"
            )
        return tuple((patch,) if i == image else () for i in range(len(counts)))
    if place in ("image", "all"):
        return _of_all_rows(inputs, place, tuple(tuple(range(n)) for n in counts))
    if place not in pair.places or not _regions(pair.places[place]):
        known = ["image", *(name for name, given in pair.places.items() if _regions(given))]
        raise InputError(f"the vision tower has no place {place!r}: choose from {', '.join(known)}, each")
    rows: list[set[int]] = [set() for _ in counts]
    for region in _regions(pair.places[place]):
        for image, patch in patches_in_box(inputs, region):
            rows[image].add(patch)
    return _of_all_rows(inputs, place, tuple(tuple(sorted(own)) for own in rows))


def _of_all_rows(inputs: VLMInputs, place: str, patches: Rows) -> Rows:
    """Return the patches, if every row of the inputs has some."""
    owners = [v.row for v in inputs.in_feature_order for _ in range(v.grid[0])]
    having = {row for row, own in zip(owners, patches, strict=True) if own}
    for row in range(len(inputs)):
        if row not in having:
            raise InputError(f"row {row} has no {place} patches")
    return patches


def patches_in_box(inputs: VLMInputs, region: Region) -> list[tuple[int, int]]:
    """(image or tile, patch) of the patches under a box, as the vision tower's tensors count them."""
    layout = inputs.image_grid(region.image)
    chosen = layout.patches.tokens_in_box(region.box, region.min_overlap, part=region.part)
    return [(int(image), int(patch)) for image, patch in _in_tower(inputs, region.image)[chosen]]


def patches_on_image(inputs: VLMInputs, image: int, part: Part = "tiles") -> Int[np.ndarray, "row col"]:
    """The number of the patch at each cell of the picture's grid, as a sweep over "each" patch counts them."""
    numbers = _in_tower(inputs, image) @ (max(n_patches(inputs)), 1)
    return inputs.image_grid(image).patches.to_image(numbers, part)[0]


def _in_tower(inputs: VLMInputs, image: int) -> Int[np.ndarray, "patch 2"]:
    """(image or tile, patch) in the vision tower's tensors of each patch of an image, as its layout numbers them."""
    layout = inputs.image_grid(image)
    order = [(v.kind, v.index) for v in inputs.in_feature_order]
    first = sum(grid[0] for grid in inputs.grids[: order.index(("image", image))])
    tile, slot = np.divmod(np.argsort(layout.tower_order.ravel()), layout.tower_order.shape[1])
    return np.stack((first + tile, inputs.spec.class_tokens + slot), axis=1)
