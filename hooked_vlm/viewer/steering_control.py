"""The served page's control of a steering vector: its layer and its scale."""

import math
from collections.abc import Callable

from nicegui import ui

from hooked_vlm.errors import InputError
from hooked_vlm.steering import SteeringVectors


class SteeringControl:
    """A layer and a scale; a scale of 0 does not steer."""

    def __init__(self, vectors: SteeringVectors, on_change: Callable[[], object]) -> None:
        ui.label(
            "A steering vector is added at the last token of the prompt and at every token of the answer. The scale "
            f"counts mean differences; 0 leaves the model as it is. Layer {vectors.best} separates best."
        ).classes("soft")
        with ui.element("div").classes("inline"):
            layers = {layer: f"layer {layer}" for layer in vectors.layers}
            self._layer = ui.select(layers, value=vectors.best, label="Steer at").props("outlined dense")
            self._scale = ui.number("Scale", value=0, step=0.5).props("outlined dense").classes("number")
        for setting in (self._layer, self._scale):
            setting.classes("number").on_value_change(on_change)

    @property
    def chosen(self) -> tuple[int, float] | None:
        """(layer, scale); None without steering.

        Raises:
            InputError: the scale is no number.
        """
        scale = self._scale.value
        if scale is None or not math.isfinite(scale):
            raise InputError("the scale must be a number: 1 adds the mean difference, 0 does not steer")
        return (int(self._layer.value or 0), float(scale)) if scale else None
