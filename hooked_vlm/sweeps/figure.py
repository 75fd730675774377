"""The effects of a sweep as a heatmap, laid out by what its runs edit."""

import re
from collections.abc import Sequence
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

Cell = tuple[str, str, int, int | str]
"""The name of the columns, what is done and where in a layer; then the layer, and the head or position."""
_OF_LAYER = re.compile(r"(.*blocks\.)(\d+)(\..*)")


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
    cells = [_cell(intervention) for intervention in result.interventions]
    grid = [cell for cell in cells if cell is not None]
    one_kind = len({cell[:2] for cell in grid}) == 1
    if len(grid) < len(cells) or not one_kind or len(set(grid)) < len(grid):
        names = [str(intervention) for intervention in result.interventions]
        return heatmap(effects[:, None], names, [""], ("run", ""), label, title)
    axis, what = grid[0][:2]
    layers, columns = _in_order([cell[2] for cell in grid]), _in_order([cell[3] for cell in grid])
    values = np.full((len(layers), len(columns)), np.nan)
    for (_, _, layer, column), effect in zip(grid, effects, strict=True):
        values[layers.index(layer), columns.index(column)] = effect
    return heatmap(values, layers, columns, ("layer", axis), label, title or what)


def _cell(intervention: Intervention) -> Cell | None:
    """The place of an intervention in a heatmap; None where it edits several heads or no layer."""
    what = type(intervention).__name__
    if isinstance(intervention, HeadIntervention):
        return ("head", what, *intervention.heads[0]) if len(intervention.heads) == 1 else None
    if not isinstance(intervention, PatchActivation | AddVector):
        return None
    found, positions = _OF_LAYER.fullmatch(intervention.name), intervention.positions
    if found is None:
        return None
    before, layer, behind = found.groups()
    what, heads = f"{what} {before}{{l}}{behind}", getattr(intervention, "heads", None)
    if heads is not None:
        at = f"{what} at {position_label(positions)}"
        return ("head", at, int(layer), int(heads[0])) if len(heads) == 1 else None
    match positions:
        case (int(position),):
            return ("position", what, int(layer), position)
    return ("position", what, int(layer), position_label(positions))


def _in_order(labels: Sequence[int | str]) -> list[int | str]:
    """Each label once: numbers by size, then names as they came."""
    numbers = {label for label in labels if isinstance(label, int)}
    return [*sorted(numbers), *dict.fromkeys(label for label in labels if isinstance(label, str))]
