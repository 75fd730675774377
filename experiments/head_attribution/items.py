"""Pictures with one main object: its name and location."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool
from PIL import Image


@dataclass(frozen=True, eq=False)
class Item:
    """A picture, its question and the expected name."""

    image: Image.Image
    """RGB."""
    name: str
    """Name of the main object."""
    question: str
    object_mask: Bool[np.ndarray, "height width"] | None = None
    """Location of the object in pixels of the picture; None if unknown."""

    @cached_property
    def id(self) -> str:
        """Digest of picture, question, name and mask (16 hexadecimal digits)."""
        digest = hashlib.sha256(f"{self.image.size} {self.question} {self.name}".encode())
        digest.update(np.asarray(self.image).tobytes())
        if self.object_mask is not None:
            digest.update(self.object_mask.tobytes())
        return digest.hexdigest()[:16]
