"""Samples: prompts with their pictures and, if known, the boxes that hold the evidence."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hooked_vlm.errors import ImageError, InputError
from hooked_vlm.inputs.images import load_image
from hooked_vlm.inputs.messages import Messages, take_pictures
from hooked_vlm.inputs.vlm_inputs import VLMInputs

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


class NamedBox(NamedTuple):
    """A box in a picture, with a name that the index keeps: "value", "face"."""

    name: str
    box: tuple[float, ...]
    """Half-open (x0, y0, x1, y1) in pixels of the original picture."""
    image: int = 0
    """The picture, counted from 0 within the sample."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt. A path in `images` is opened only when the sample is processed."""

    id: str
    prompt: str | Messages
    images: Sequence[Any] = ()
    """Paths, PIL images or uint8 arrays, in the order of the prompt."""
    boxes: Sequence[NamedBox] = ()
    answer: str | None = None
    """Text that follows the prompt: the group "generated"."""

    @property
    def pictures(self) -> list[Any]:
        """`images`, or the pictures that the prompt's messages carry."""
        inside = [] if isinstance(self.prompt, str) else take_pictures(self.prompt)[1]
        return [*self.images, *(picture.source for picture in inside)]

    def inputs(self, model: "HookedVLM", **bounds: Any) -> VLMInputs:
        """Inputs of this sample alone.

        Raises:
            InputError: a picture that cannot be read, a prompt that does not fit; a video.
        """
        try:
            inputs = model.to_inputs(self.prompt, images=list(self.images) or None, **bounds)
            inputs = inputs if self.answer is None else inputs.append(self.answer)
        except (InputError, ImageError) as error:
            raise InputError(f"sample {self.id!r}: {error}") from error
        if any(visual.kind == "video" for visual in inputs.visuals):
            raise InputError(f"sample {self.id!r} has a video: give its frames as images")
        if unknown := [box for box in self.boxes if not 0 <= box.image < inputs.n_images]:
            raise InputError(
                f"sample {self.id!r} has {inputs.n_images} image(s), but the box {unknown[0].name!r} lies in image "
                f"{unknown[0].image}"
            )
        return inputs

    def digest(self) -> str:
        """Digest of everything that decides the sample's activations; picture files are read but not decoded.

        Raises:
            InputError: a picture that cannot be read.
        """
        prompt = self.prompt
        settings: list[str] = []
        if not isinstance(prompt, str):
            prompt, own, _ = take_pictures(prompt)
            settings = [f"{i} {picture.settings}" for i, picture in enumerate(own) if picture.settings.resizes]
        boxes = [[box.name, *map(float, box.box), box.image] for box in self.boxes]
        digest = hashlib.sha256(json.dumps([self.id, prompt, self.answer, boxes, *settings], sort_keys=True).encode())
        for picture in self.pictures:
            try:
                digest.update(_picture_digest(picture))
            except (ImageError, OSError) as error:
                raise InputError(f"sample {self.id!r}: {error}") from error
        return digest.hexdigest()


def _picture_digest(picture: Any) -> bytes:
    if isinstance(picture, str | os.PathLike) and os.path.isfile(picture):
        with open(picture, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    if isinstance(picture, Mapping) and picture.get("bytes"):  # an undecoded picture of `datasets`
        return hashlib.sha256(picture["bytes"]).digest()
    rgb = load_image(picture)
    return hashlib.sha256(f"{rgb.size} ".encode() + rgb.tobytes()).digest()
