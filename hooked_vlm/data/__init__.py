"""Data sets of prompts and pictures, read one sample at a time."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.data.samples import NamedBox, Sample
    from hooked_vlm.data.sources import Samples, read_samples

__all__ = ["NamedBox", "Sample", "Samples", "read_samples"]
__getattr__, __dir__ = lazy_names(__name__)
