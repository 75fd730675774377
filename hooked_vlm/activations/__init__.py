"""Activations of whole data sets on disk: streamed in bounded memory, resumable, read back by row."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.activations.read import Activations, Batch
    from hooked_vlm.activations.samples import NamedBox, Sample, read_samples
    from hooked_vlm.activations.write import stream_activations

__all__ = ["Activations", "Batch", "NamedBox", "Sample", "read_samples", "stream_activations"]
__getattr__, __dir__ = lazy_names(__name__)
