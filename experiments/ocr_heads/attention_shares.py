"""Shares of the heads' attention, measured sample by sample and stored."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_vlm.experiments.ocr_heads.data.store import DataSet
from hooked_vlm.experiments.ocr_heads.examples import Example
from hooked_vlm.experiments.ocr_heads.study import Study
from hooked_vlm.model.vlm import HookedVLM

Measure = Callable[[HookedVLM, Sequence[Example], int | None], Float[np.ndarray, "sample ..."]]
"""(model, examples, pixels) -> shares of each example."""


def measured_by_sample(
    study: Study, measure: Measure, sets: Mapping[str, DataSet], name: str, settings: Mapping[str, Any]
) -> Float[np.ndarray, "sample ..."]:
    """Measure every sample of some data sets, batch by batch; finished batches are stored.

    Args:
        sets: label of the progress bar -> data set.
        name: of the stored results.
        settings: of the measure, which the results depend on.
    """
    found = []
    for label, data in sets.items():
        units = []
        for group, n_tokens in study.groups(study.model, data.examples):
            key = {name: data.digest, "model": study.identity, "examples": group, "pixels": study.pixels, **settings}
            own = [data.examples[i] for i in group]
            units.append(study.unit(key, as_column, (measure, own, study.pixels), n_tokens))
        found += study.tables(units, label)
    table = pd.concat(found)
    shares = np.stack([np.asarray(own, dtype=np.float64) for own in table["shares"]])
    return shares.reshape(len(table), *table["shape"].iloc[0])


def as_column(model: HookedVLM, measure: Measure, examples: Sequence[Example], pixels: int | None) -> pd.DataFrame:
    """Flattened shares of each example, and their shape."""
    return pd.DataFrame([{"shares": own.ravel(), "shape": own.shape} for own in measure(model, examples, pixels)])
