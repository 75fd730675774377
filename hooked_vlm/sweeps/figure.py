"""The effects of a sweep as a heatmap, laid out by what its runs edit."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from hooked_vlm.analysis.pictures import heatmap
from hooked_vlm.errors import InputError
from hooked_vlm.interventions.activations import AddVector, PatchActivation, position_label
from hooked_vlm.interventions.base import Intervention
from hooked_vlm.interventions.heads import HeadIntervention

if TYPE_CHECKING:
    from hooked_vlm.sweeps.run import SweepResult

_OF_LAYER = re.compile(r"(.*blocks\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Cell:
    """The place of a run in a heatmap."""

    axis: str
    """What the columns are: heads or positions."""
    what: str
    """What is done, and where in a layer."""
    settings: tuple
    """Everything else in which two runs of one heatmap must agree."""
    layer: int
    column: int | str


def effects_figure(result: "SweepResult", title: str = "") -> Figure:
    """Draw the mean effect over rows of each run.

    Raises:
        InputError: there are no runs.
    """
    if not result.interventions:
        raise InputError("this sweep had no interventions: there is nothing to draw")
    effects = result.effects.float().mean(1).cpu().numpy()
    n_rows = result.values.shape[1]
    label = "effect on the metric" if n_rows == 1 else f"effect on the metric, mean of {n_rows} rows"
    cells = [cell for intervention in result.interventions if (cell := _cell(intervention)) is not None]
    n_kinds = len({(cell.axis, cell.what, cell.settings) for cell in cells})
    if n_kinds != 1 or len(set(cells)) < len(result.interventions):
        names = [str(intervention) for intervention in result.interventions]
        return heatmap(effects[:, None], names, [""], ("run", ""), label, title)
    layers, columns = _in_order([cell.layer for cell in cells]), _in_order([cell.column for cell in cells])
    values = np.full((len(layers), len(columns)), np.nan)
    for cell, effect in zip(cells, effects, strict=True):
        values[layers.index(cell.layer), columns.index(cell.column)] = effect
    return heatmap(values, layers, columns, ("layer", cells[0].axis), label, title or cells[0].what)


def _cell(intervention: Intervention) -> Cell | None:
    """The place of an intervention in a heatmap; None where it edits several heads or no layer."""
    if isinstance(intervention, HeadIntervention):
        return _head_cell(intervention)
    if not isinstance(intervention, PatchActivation | AddVector):
        return None
    found, positions = _OF_LAYER.fullmatch(intervention.name), intervention.positions
    if found is None:
        return None
    before, layer, behind = found.groups()
    what, heads = f"{type(intervention).__name__} {before}{{l}}{behind}", getattr(intervention, "heads", None)
    settings = (getattr(intervention, "scale", None),)
    if heads is not None:
        what = f"{what} at {position_label(positions)}"
        return Cell("head", what, settings, int(layer), int(heads[0])) if len(heads) == 1 else None
    match positions:
        case (int(position),):
            return Cell("position", what, settings, int(layer), position)
    return Cell("position", what, settings, int(layer), position_label(positions))


def _head_cell(intervention: HeadIntervention) -> Cell | None:
    if len(intervention.heads) != 1:
        return None
    varied = (getattr(intervention, name) for name in sorted(intervention.varies - {"heads"}))
    what = type(intervention).__name__ + (" in the vision tower" if intervention.in_tower == "vision" else "")
    return Cell("head", what, (*intervention.kind, *varied), *intervention.heads[0])


def _in_order(labels: Sequence[int | str]) -> list[int | str]:
    """Each label once: numbers by size, then names as they came."""
    numbers = {label for label in labels if isinstance(label, int)}
    return [*sorted(numbers), *dict.fromkeys(label for label in labels if isinstance(label, str))]
