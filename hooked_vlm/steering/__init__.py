"""Steering: contrast sets to vectors by mean difference, with held-out separability; applied as interventions.

vectors = steering_vectors(model, positive, negative)
steer = vectors.at(vectors.best, scale=2.0)
model.generate(inputs, fwd_hooks=steer.hooks(model, inputs))
vectors.save("steering.safetensors")
"""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.steering.contrast import Item, steering_vectors
    from hooked_vlm.steering.separability import area_interval, separability_of
    from hooked_vlm.steering.streams import Streams, mean_streams
    from hooked_vlm.steering.vectors import HOOKS, SteeringVectors

__all__ = [
    "HOOKS", "Item", "SteeringVectors", "Streams", "area_interval", "mean_streams", "separability_of",
    "steering_vectors",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
