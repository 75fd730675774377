"""Samples: prompts with their pictures and, if known, the boxes that hold the evidence."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hooked_vlm.errors import ImageError, InputError
from hooked_vlm.inputs.images import load_image
from hooked_vlm.inputs.messages import Messages, take_pictures
from hooked_vlm.inputs.vlm_inputs import VLMInputs

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_FIELDS = ("id", "prompt", "images", "boxes", "answer")


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
        prompt, pictures = self.prompt, list(self.images)
        settings: list[str] = []
        if not isinstance(prompt, str):
            prompt, own, _ = take_pictures(prompt)
            pictures += [picture.source for picture in own]
            settings = [f"{i} {picture.settings}" for i, picture in enumerate(own) if picture.settings.resizes]
        boxes = [[box.name, *map(float, box.box), box.image] for box in self.boxes]
        digest = hashlib.sha256(json.dumps([self.id, prompt, self.answer, boxes, *settings], sort_keys=True).encode())
        for picture in pictures:
            try:
                digest.update(_picture_digest(picture))
            except (ImageError, OSError) as error:
                raise InputError(f"sample {self.id!r}: {error}") from error
        return digest.hexdigest()


def _picture_digest(picture: Any) -> bytes:
    if isinstance(picture, str | os.PathLike) and os.path.isfile(picture):
        with open(picture, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    rgb = load_image(picture)
    return hashlib.sha256(f"{rgb.size} ".encode() + rgb.tobytes()).digest()


def read_samples(path: str | Path, prompt: str | None = None) -> Iterator[Sample]:
    """The samples of a JSON-lines file one by one, or every picture of a folder with the same prompt.

    A line is `{"id": ..., "prompt": ..., "images": [paths], "boxes": [{"name", "box", "image"}], "answer": ...}`;
    only the prompt is required, and not even that if `prompt` is given. Paths are relative to the file. Without an
    id, a sample is called by the number of its line, from 0.

    Raises:
        InputError: no such file, no pictures, a line that cannot be used (which is named).
    """
    path = Path(path)
    if path.is_dir():
        pictures = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
        if not pictures:
            raise InputError(f"the folder {path} holds no pictures ({', '.join(PICTURES)})")
        if prompt is None:
            raise InputError("a folder of pictures needs a prompt to ask about each of them: --prompt")
        return (Sample(picture.name, prompt, (picture,)) for picture in pictures)
    if not path.is_file():
        raise InputError(f"there is no file or folder {path}: give JSON lines or a folder of pictures")
    return _read_lines(path, prompt)


def _read_lines(path: Path, prompt: str | None) -> Iterator[Sample]:
    seen: set[str] = set()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            where = f"{path}, line {number + 1}"
            try:
                sample = _from_json(json.loads(line), str(number), prompt, path.parent)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise InputError(f"{where}: expected one sample as a JSON object, {error}") from error
            if sample.id in seen:
                raise InputError(f"{where}: the id {sample.id!r} is taken already: every sample needs its own")
            seen.add(sample.id)
            yield sample


def _from_json(fields: Any, id: str, prompt: str | None, folder: Path) -> Sample:
    if not isinstance(fields, dict):
        raise TypeError(f"got a {type(fields).__name__}")
    if unknown := sorted(set(fields) - set(_FIELDS)):
        raise ValueError(f"got the unknown field {unknown[0]!r} (known: {', '.join(_FIELDS)})")
    images, boxes = fields.get("images", []), fields.get("boxes", [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise TypeError(f"got images that are no list of paths: {images!r}")
    asked = fields.get("prompt", prompt)
    if not isinstance(asked, str | list):
        raise TypeError("got no prompt")
    named = tuple(NamedBox(str(b["name"]), tuple(map(float, b["box"])), int(b.get("image", 0))) for b in boxes)
    return Sample(str(fields.get("id", id)), asked, tuple(folder / p for p in images), named, fields.get("answer"))
