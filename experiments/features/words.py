"""What was found, in sentences."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from hooked_vlm.analysis.text_tables import text_table
from hooked_vlm.experiments.features.config import FindConfig
from hooked_vlm.toys.drawings import OBJECTS

AT = {
    "image": "image tokens; F1 and its 95% interval (over pictures) are those of the other half. A token shows a "
    "character if more than half of the character's box lies in it, an object if more than half of the token lies on "
    "it.",
    "answer": "positions of the answer; F1 and its 95% interval (over pictures) are those of the other half. A "
    "position stands for the token that follows it.",
}


def kind_of(label: str) -> str:
    """What a label names."""
    return "object" if label in OBJECTS else "glyph" if len(label) == 1 else "label"


def sentence(row: Mapping[Any, Any]) -> str:
    """What was found for a label."""
    name = f"{kind_of(row['label'])} '{row['label']}'"
    if pd.isna(row["F1"]):
        return f"{name}: no token of the second half shows it, or is marked"
    ends = "too few pictures" if pd.isna(row["low"]) else f"{row['low']:.2f} to {row['high']:.2f}"
    compared = "; ".join(f"{name} {row[name]:.2f}" for name in ("unit", "permuted", "probe"))
    scored = f"F1 {row['F1']:.2f} ({ends}); {compared}"
    return f"{name} is feature {row['feature']}: {scored}" if row["found"] else f"no feature for {name}: best {scored}"


def how(config: FindConfig) -> str:
    """How it was decided."""
    return (
        "Feature and threshold are chosen for each label on half of the pictures, by the largest F1 over "
        f"{AT[config.at]} Unit is the best single unit of the activations, with either sign; permuted is the largest "
        "F1 of permuted labels; probe is a linear probe, fitted on the first half: what one direction can tell. All "
        f"are chosen and scored alike. There are {config.permutations} permutations, between pictures of one kind. A "
        f"label has a feature if the interval begins at {config.at_least:g} or above, and all permutations are below."
    )


def findings(table: pd.DataFrame) -> str:
    """What was found for every label, as a table for the terminal."""
    numbers = ("F1", "low", "high", "unit", "permuted", "probe")
    rows = [
        [
            f"{kind_of(row['label'])} {row['label']}",
            str(row["feature"]) if row["found"] else f"none ({row['feature']})",
            *("" if pd.isna(row[name]) else f"{row[name]:.2f}" for name in numbers),
        ]
        for row in table.to_dict("records")
    ]
    return text_table(["label", "feature", *numbers], rows)
