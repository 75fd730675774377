"""An atlas in the terminal: for each score the strongest heads, and how many stand out from the null."""

import numpy as np
import pandas as pd
from jaxtyping import Bool

from hooked_vlm.analysis.intervals import FEWEST
from hooked_vlm.analysis.text_tables import text_table
from hooked_vlm.atlas.definitions import TOWERS, Score
from hooked_vlm.atlas.result import Atlas
from hooked_vlm.atlas.summary import fewest_stimuli

SHOWN = 2
"""Heads named for each score."""
ALPHA = 0.05


def in_terminal(found: Atlas) -> str:
    """The answer, then a table for each tower."""
    parts = [_answer(found)]
    for tower in found.towers:
        layers, heads = found.shape(tower)
        header = (f"{TOWERS[tower]}: {layers} x {heads}", "above null", "n", *["strongest"] + [""] * (SHOWN - 1))
        rows = [_row(found, score) for score in found.scores if score.tower == tower]
        parts.append(text_table(header, rows))
    parts.append(
        "above null: heads whose mean is above that of the null, two-sided t over stimuli, p <= 0.05 after Holm's "
        "correction for all heads of the score (–: no test). strongest: layer.head, mean over n stimuli."
    )
    return "\n\n".join(parts)


def above_null(rows: pd.DataFrame) -> Bool[np.ndarray, "row"]:
    """Which rows of `Atlas.table` stand out from their null."""
    return ((rows["p_holm"] <= ALPHA) & (rows["value"] > rows["null"])).to_numpy(dtype=bool)


def number_of_tests(rows: pd.DataFrame) -> int:
    """Number of rows of `Atlas.table` that have a p."""
    return int(np.isfinite(rows["p"].to_numpy()).sum())


def no_power(rows: pd.DataFrame) -> str:
    """A sentence where none of the tests of a family can pass, on so few stimuli; else nothing."""
    n_tests, n = number_of_tests(rows), rows["n"].to_numpy().max()
    if n_tests == 0 or n >= (fewest := fewest_stimuli(n_tests, ALPHA)):
        return ""
    return f" On {n} stimuli none of {n_tests:,} tests can pass: take {fewest} or more."


def _answer(found: Atlas) -> str:
    """The sentence to quote."""
    name = "ocr" if "ocr" in found.observed else found.scores[0].name
    rows = found.rows(name)
    if not number_of_tests(rows):
        return f"{found.model}: no head was tested for {name}, which takes {FEWEST} stimuli and their nulls."
    n = int(above_null(rows).sum())
    what = "read text in pictures (OCR score" if name == "ocr" else f"stand out ({name}"
    return f"{found.model}: {n} of {len(rows)} heads {what} above its null).{no_power(rows)}"


def _row(found: Atlas, score: Score) -> tuple[str, ...]:
    rows = found.rows(score.name)
    best = [
        f"{row['layer']}.{row['head']}: {row['value']:.3g}"
        for row in rows.sort_values("value", ascending=False, kind="stable").head(SHOWN).to_dict("records")
    ]
    tested = str(int(above_null(rows).sum())) if number_of_tests(rows) else "–"
    return (score.title, tested, str(rows["n"].max()), *best, *[""] * (SHOWN - len(best)))
