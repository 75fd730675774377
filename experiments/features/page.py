"""The feature page of a dictionary: what was found, pictures, logits, ablation."""

from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from hooked_vlm.experiments.features.config import PageConfig
from hooked_vlm.experiments.features.effects import Ablation, direct_logits
from hooked_vlm.experiments.features.pipeline import Found
from hooked_vlm.experiments.features.words import how, sentence
from hooked_vlm.inputs.images import load_image
from hooked_vlm.runtime.progress import Progress
from hooked_vlm.viewer.feature_view import FeatureEntry, FeaturePage, histogram, top_marks

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

PICTURES = 8
"""Pictures shown of each feature."""


def feature_page(config: PageConfig, found: Found, model: "HookedVLM") -> FeaturePage:
    """The features with a label, then those with the largest F1 for any, then those that are active most often."""
    active: pd.DataFrame = found.table.query("active > 0")
    ordered = active.sort_values(by=["found", "F1", "active"], ascending=False, na_position="last")
    chosen = ordered.head(config.shown)
    numbers = chosen["feature"].tolist()
    logits = direct_logits(model, found.dictionary, numbers)
    ablation = Ablation(model, found.dictionary, [picture.sample for picture in found.pictures])
    said = {row["label"]: sentence(row) for row in found.meanings.to_dict("records")}
    shown: dict[int, int] = {}
    entries = []
    with Progress("features", "feature", len(chosen), quiet=config.quiet) as bar:
        for row, (raised, lowered) in zip(chosen.to_dict("records"), logits, strict=True):
            feature, label = int(row["feature"]), row["label"] if isinstance(row["label"], str) else ""
            values = found.features[:, feature]
            tops = top_marks(values, found.read.tokens.picture, found.read.boxes, max(PICTURES, config.ablated))
            marks = [
                replace(
                    top, picture=shown.setdefault(top.picture, len(shown)),
                    frames=found.pictures[top.picture].frames(label),
                )
                for top in tops[:PICTURES]
            ]  # fmt: skip
            entries.append(
                FeatureEntry(
                    feature=feature, label=label, said=said.get(label, "No label chose it."),
                    found=row["found"] is True, score=float(row["F1"]) if label else None, active=float(row["active"]),
                    largest=float(row["largest"]), counts=histogram(values), marks=tuple(marks),
                    raised=raised, lowered=lowered,
                    effect=ablation.effect(feature, [top.picture for top in tops[: config.ablated]]),
                )
            )  # fmt: skip
            bar.update()
    name = found.dictionary.hook_name
    return FeaturePage(
        f"Features of {model.cfg.model_name} at {name}",
        how(config),
        tuple(entries),
        tuple(load_image(found.pictures[picture].sample.images[0]) for picture in shown),
        (("model", model.cfg.model_name), ("hook point", name), ("features", f"{found.dictionary.n_features:,}")),
    )
