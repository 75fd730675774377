"""A picture of the study as a page to look at (`hooked_vlm.viewer`)."""

from typing import Any

import numpy as np

from hooked_vlm import viewer
from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.head_attribution.measurements import Measured
from hooked_vlm.viewer import View


def heads_page(measured: Measured, picture: int = 0) -> View:
    """Where the heads that carry a picture look in it: attention of the token that gives the name, heads from the
    largest coefficient to the smallest.

    Raises:
        StudyError: no such picture, or heads were not regressed.
    """
    probe = measured.probes[_place(picture, measured.heads, "heads")]
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
    """What each image token adds to the answer: the coefficients of the regression over image tokens.

    Raises:
        StudyError: no such picture, or image tokens were not regressed.
    """
    probe = measured.probes[_place(picture, measured.tokens, "image tokens")]
    return viewer.values(
        probe.case.inputs,
        measured.tokens[picture].fit.coefficients,
        quantity="coefficient",
        title=f"Image tokens that carry the {probe.case.item.name}",
        note="What keeping an image token in sight of the text adds to the target, by regression over random sets.",
        **_shown(probe.case.item),
    )


def _place(picture: int, regressed: list, what: str) -> int:
    if not 0 <= picture < len(regressed):
        counted = (
            f"{len(regressed)} pictures were" if regressed else "none was in this run: it is another section's work"
        )
        raise StudyError(f"there is no picture {picture} whose {what} were regressed: {counted}")
    return picture


def _shown(item: Any) -> dict[str, Any]:
    """The picture itself, and a box around the object where its place is known."""
    if item.object_mask is None or not item.object_mask.any():
        return {"images": item.image}
    rows, columns = (np.flatnonzero(item.object_mask.any(axis)) for axis in (1, 0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return {"images": item.image, "boxes": [box]}
