"""Activations of whole data sets on disk: streamed in bounded memory, resumable, read back by row."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.activations.hub import load_activations, push_activations
    from hooked_vlm.activations.join import join_activations
    from hooked_vlm.activations.read import Activations, Batch
    from hooked_vlm.activations.write import stream_activations
    from hooked_vlm.data.samples import NamedBox, Sample
    from hooked_vlm.data.sources import read_samples

__all__ = [
    "Activations", "Batch", "NamedBox", "Sample", "join_activations", "load_activations", "push_activations",
    "read_samples", "stream_activations",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
