"""Activations of whole data sets on disk: streamed in bounded memory, resumable, read back by row."""

from hooked_vlm.activations.read import Activations as Activations
from hooked_vlm.activations.read import Batch as Batch
from hooked_vlm.activations.samples import NamedBox as NamedBox
from hooked_vlm.activations.samples import Sample as Sample
from hooked_vlm.activations.samples import read_samples as read_samples
from hooked_vlm.activations.write import stream_activations as stream_activations
