"""Steering vectors: data that compiles to interventions, saved with where they come from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.interventions import AddVector, Compose, Positions
from hooked_vlm.model.fingerprints import weights_hash
from hooked_vlm.runtime.files import why
from hooked_vlm.steering.files import read_file, write_file

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
"""Points of a block's residual stream."""
ANSWER: Positions = "final+generated"
"""Where vectors are added by default: the last token of the prompt and every token generated after it."""


@dataclass(frozen=True, eq=False)
class SteeringVectors:
    """One vector for each layer: the mean residual stream of positive items minus that of negative ones."""

    hook: str
    """One of `HOOKS`."""
    layers: tuple[int, ...]
    vectors: Float[Tensor, "layer d_model"]
    """float32, on the CPU."""
    stream_norms: Float[Tensor, "layer"]
    """Mean norm of the residual stream at these positions, over the items of both sets that the vectors are fitted
    on."""
    positions: Positions
    """Positions that the streams were averaged over."""
    best: int
    """Layer with the largest AUC on items used for this choice alone."""
    separability: pd.DataFrame
    """Of held-out items, used neither for the vectors nor for the choice; one row per layer (`separability_of`)."""
    held_out: tuple[tuple[int, ...], tuple[int, ...]]
    """Numbers of these items in the positive and in the negative set."""
    provenance: Mapping[str, Any]
    """Model, data and settings."""

    def name(self, layer: int) -> str:
        """The layer's hook point."""
        return f"blocks.{layer}.{self.hook}"

    def vector(self, layer: int) -> Float[Tensor, "d_model"]:
        """The vector of a layer.

        Raises:
            InputError: there is none for this layer.
        """
        if layer not in self.layers:
            raise InputError(f"there is no vector for layer {layer}: layers are {', '.join(map(str, self.layers))}")
        return self.vectors[self.layers.index(layer)]

    def at(self, layer: int, scale: int | float = 1.0, positions: Positions = ANSWER) -> AddVector:
        """Add a layer's vector.

        Args:
            scale: in multiples of the mean difference: 1 moves the mean negative item onto the mean positive one, -1
                back. `stream_norms` puts this in relation to the stream's norm.
            positions: the last prompt token and what is generated, by default; None for all.
        """
        return AddVector(self.name(layer), self.vector(layer), float(scale), positions)

    def at_layers(self, scales: Mapping[int, int | float], positions: Positions = ANSWER) -> Compose:
        """Add the vectors of several layers, each with its scale."""
        return Compose(tuple(self.at(layer, scale, positions) for layer, scale in scales.items()))

    def control(self, layer: int, seed: int, scale: int | float = 1.0, positions: Positions = ANSWER) -> AddVector:
        """Add a random vector with the norm of the layer's own: what any vector of this size does."""
        vector = self.vector(layer)
        drawn = torch.randn(len(vector), generator=torch.Generator().manual_seed(seed))
        return AddVector(self.name(layer), drawn * (vector.norm() / drawn.norm()), float(scale), positions)

    def check_model(self, model: "HookedVLM", other_weights: bool = False) -> None:
        """Refuse a model that the vectors were not made with.

        A direction has its meaning in the weights that it was measured in. A fine-tuned sibling has the same shape and
        would take the vectors without an error, so weights are compared too.

        Args:
            other_weights: allow them, for the transfer between siblings or between dtypes.

        Raises:
            InputError: another width, layers that the model does not have, or other weights.
        """
        cfg, d_model = model.cfg, self.vectors.shape[1]
        if d_model != cfg.d_model or max(self.layers) >= cfg.n_layers:
            raise InputError(
                f"the vectors have {d_model} numbers and layers up to {max(self.layers)}, but {cfg.model_name} has "
                f"d_model {cfg.d_model} and layers 0 to {cfg.n_layers - 1}: they were made with "
                f"{self.provenance.get('model', 'another model')}"
            )
        made_with = self.provenance.get("weights")
        if not other_weights and made_with != (here := weights_hash(model)):
            raise InputError(
                f"the vectors were made with {self.provenance.get('model')} in {self.provenance.get('dtype')} (weights "
                f"{made_with}), and this is {cfg.model_name} in {str(cfg.dtype).removeprefix('torch.')} (weights "
                f"{here}): load that one, or allow other weights of the same shape with other_weights=True"
            )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, with everything but the tensors as JSON in its metadata.

        Raises:
            OutputError: it cannot be written; nothing is left of it.
        """
        table = json.loads(str(self.separability.to_json(orient="records", double_precision=15)))
        header = {
            "hook": self.hook, "layers": self.layers, "positions": self.positions, "best": self.best,
            "separability": table, "held_out": self.held_out, "provenance": dict(self.provenance),
        }  # fmt: skip
        return write_file(Path(path), {"vectors": self.vectors, "stream_norms": self.stream_norms}, header)

    @classmethod
    def load(cls, path: str | Path, model: "HookedVLM | None" = None, other_weights: bool = False) -> "SteeringVectors":
        """Read what `save` wrote, and check that it fits a model, if one is given (`check_model`).

        Raises:
            InputError: there is no such file, it is damaged, or it belongs to another model.
        """
        tensors, header = read_file(Path(path))
        try:
            _check_fit(tensors, header)
            found = cls(
                hook=header["hook"],
                layers=tuple(header["layers"]),
                vectors=tensors["vectors"],
                stream_norms=tensors["stream_norms"],
                positions=_as_positions(header["positions"]),
                best=header["best"],
                separability=pd.DataFrame(header["separability"]),
                held_out=(tuple(header["held_out"][0]), tuple(header["held_out"][1])),
                provenance=dict(header["provenance"]),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged: {why(error)}") from error
        if model is not None:
            found.check_model(model, other_weights)
        return found


def _check_fit(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Check that the parts of a file fit each other.

    Raises:
        ValueError: names what does not.
    """
    layers, best, vectors = header["layers"], header["best"], tensors["vectors"]
    if not layers or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise ValueError(f"its layers are {layers!r}")
    if header["hook"] not in HOOKS or best not in layers:
        raise ValueError(f"its hook point is {header['hook']!r} and its best layer {best!r}")
    if vectors.ndim != 2 or len(vectors) != len(layers) or tensors["stream_norms"].shape != (len(layers),):
        raise ValueError(f"its tensors do not fit {len(layers)} layers")
    if any(tensors[name].dtype != torch.float32 for name in ("vectors", "stream_norms")):
        raise ValueError("its tensors are not float32")


def _as_positions(stored: Any) -> Positions:
    """Positions from JSON, which has lists for tuples."""
    if not isinstance(stored, list):
        return stored
    return tuple(tuple(one) if isinstance(one, list) else one for one in stored)  # pyright: ignore[reportReturnType]
