"""What was found, in sentences."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from hooked_vlm.experiments.features.config import FindConfig
from hooked_vlm.toys.drawings import OBJECTS


def kind_of(label: str) -> str:
    """What a label names."""
    return "object" if label in OBJECTS else "glyph" if len(label) == 1 else "label"


def sentence(row: Mapping[Any, Any]) -> str:
    """What was found for a label."""
    name = f"{kind_of(row['label'])} '{row['label']}'"
    if pd.isna(row["F1"]):
        return f"{name}: no token of the second half shows it, or is marked"
    ends = "too few pictures" if pd.isna(row["low"]) else f"{row['low']:.2f} to {row['high']:.2f}"
    scored = f"F1 {row['F1']:.2f} ({ends}); unit {row['unit']:.2f}; permuted {row['permuted']:.2f}"
    return f"{name} is feature {row['feature']}: {scored}" if row["found"] else f"no feature for {name}: best {scored}"


def how(config: FindConfig) -> str:
    """How it was decided."""
    return (
        "Feature and threshold are chosen for each label on half of the pictures, by the largest F1 over image tokens; "
        "F1 and its 95% interval (over pictures) are those of the other half. A token shows a character if more than "
        "half of the character's box lies in it, an object if more than half of the token lies on it. Unit is the best "
        "single unit of the activations, with either sign, chosen and scored alike; permuted is the largest F1 of "
        f"{config.permutations} permutations of the labels between pictures of one kind, chosen and scored alike. A "
        f"label has a feature if the interval begins at {config.at_least:g} or above, and all permutations are below."
    )
