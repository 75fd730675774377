"""Viewer pages of the study's pictures (`hooked_vlm.viewer`)."""

from typing import Any

import numpy as np

from hooked_vlm import viewer
from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.head_attribution.items import Item
from hooked_vlm.experiments.head_attribution.measurements import Measured
from hooked_vlm.viewer import View


def heads_page(measured: Measured, picture: int = 0) -> View:
    """Page with each head's attention at the token that predicts the name, heads by descending coefficient.

    Raises:
        StudyError: no such picture, the run has no regression over heads, or it is about the vision tower's.
    """
    probe = measured.probes[_place(picture, measured.heads, "heads")]
    if probe.tower == "vision":
        raise StudyError("this page shows where text looks: it is for heads of the language model, --tower language")
    order = np.argsort(-measured.heads[picture].fit.coefficients, kind="stable")
    return viewer.attention(
        probe.model,
        probe.case.inputs,
        answer=[probe.case.target],
        heads=[probe.heads[i] for i in order],
        title=f"Heads that carry the {probe.case.item.name}, by head attribution",
        **_shown(probe.case.item),
    )


def tokens_page(measured: Measured, picture: int = 0) -> View:
    """Page with the coefficient of each image token.

    Raises:
        StudyError: no such picture, or the run has no regression over image tokens.
    """
    probe = measured.probes[_place(picture, measured.tokens, "image tokens")]
    return viewer.values(
        probe.case.inputs,
        measured.tokens[picture].fit.coefficients,
        quantity="coefficient",
        title=f"Image tokens that carry the {probe.case.item.name}",
        note="A coefficient is what the image token adds to the target when the text sees it (regression).",
        **_shown(probe.case.item),
    )


def _place(picture: int, regressed: list, what: str) -> int:
    if not 0 <= picture < len(regressed):
        counted = f"has {len(regressed)} pictures" if regressed else "did not include that section"
        raise StudyError(f"there is no picture {picture} with a regression over {what}: this run {counted}")
    return picture


def _shown(item: Item) -> dict[str, Any]:
    """The picture, and a box around the object if its location is known."""
    if item.object_mask is None or not item.object_mask.any():
        return {"images": item.image}
    rows, columns = (np.flatnonzero(item.object_mask.any(axis)) for axis in (1, 0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return {"images": item.image, "boxes": [box]}
