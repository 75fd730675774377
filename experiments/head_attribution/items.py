"""A picture with one main object, its name, and where the object lies."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool
from PIL import Image


@dataclass(frozen=True, eq=False)
class Item:
    """A picture to ask about."""

    image: Image.Image
    """RGB."""
    name: str
    """Of its main object."""
    question: str
    object_mask: Bool[np.ndarray, "height width"] | None = None
    """Where the object lies, in pixels of the picture; None if it is not known."""

    @cached_property
    def id(self) -> str:
        """Sixteen digits made from the picture, the question and the name."""
        digest = hashlib.sha256(f"{self.image.size} {self.question} {self.name}".encode())
        digest.update(np.asarray(self.image).tobytes())
        if self.object_mask is not None:
            digest.update(self.object_mask.tobytes())
        return digest.hexdigest()[:16]
