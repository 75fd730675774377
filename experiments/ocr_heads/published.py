"""The head lists published with the OCR-heads paper, and how a run's heads compare with them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePosixPath

import numpy as np
from jaxtyping import Float

from hooked_vlm.interventions import Head

EDGES = {"[0, 0.01)": 0.01, "[0.01, 0.1]": 0.1, "(0.1, 0.3]": 0.3, "(0.3, 0.5]": 0.5, "(0.5, 1]": 1.0}
"""Upper ends of the paper's score ranges."""


@dataclass(frozen=True)
class Comparison:
    """A run's heads against the published ones of the same model."""

    model: str
    jaccard: float
    """Of the two sets of heads that score above 0.1."""
    top_k: int
    """Published heads that score above 0.5 ..."""
    top_k_found: int
    """... and how many of them are among as many top heads here."""
    heads_per_range: dict[str, tuple[int, int]]
    """Score range: (published, here)."""


def published_for(model_name: str) -> dict | None:
    """The published record of a model, by the last part of its name or path; None if there is none."""
    models = json.loads(resources.files(str(__package__)).joinpath("published.json").read_text(encoding="utf-8"))[
        "models"
    ]
    wanted = PurePosixPath(model_name.replace("\\", "/")).name.lower()
    return next((m | {"name": name} for name, m in models.items() if name.split("/")[1].lower() == wanted), None)


def compare(model_name: str, scores: Float[np.ndarray, "layer head"]) -> Comparison | None:
    """How the heads found in a published model agree with the paper's; None for other models."""
    record = published_for(model_name)
    if record is None or scores.shape != (record["n_layers"], record["n_heads"]):
        return None
    groups: dict[str, list[Head]] = {k: [(a, b) for a, b in v] for k, v in record["ocr_heads"].items()}
    theirs = {head for group in groups.values() for head in group}
    ours = {(int(a), int(b)) for a, b in np.argwhere(scores > 0.1)}
    top = set(groups["(0.5, 1]"])
    return Comparison(
        record["name"],
        len(theirs & ours) / max(1, len(theirs | ours)),
        len(top),
        len(top & set(ranked(scores)[: len(top)])),
        {name: (record["heads_per_bin"][name], n) for name, n in per_range(scores).items()},
    )


def per_range(scores: Float[np.ndarray, "layer head"]) -> dict[str, int]:
    """Heads in each of the paper's score ranges."""
    upper = np.array(list(EDGES.values()))
    at = np.where(scores < 0.01, 0, np.searchsorted(upper, scores.clip(0.01, 1.0), side="left").clip(1))
    return {name: int((at == i).sum()) for i, name in enumerate(EDGES)}


def ranked(scores: Float[np.ndarray, "layer head"]) -> list[Head]:
    """Heads from the highest score to the lowest; ties in order of layer and head."""
    order: Sequence[int] = np.argsort(-scores, axis=None, kind="stable").tolist()
    return [divmod(i, scores.shape[1]) for i in order]
