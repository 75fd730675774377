"""`hooked-vlm view`: where a model looks in a picture, written as a page and opened, or served and asked again."""

import webbrowser
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_vlm.commands.config import ViewConfig
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.images import load_image
from hooked_vlm.model.by_name import load
from hooked_vlm.runtime.files import writable_folder
from hooked_vlm.steering import SteeringVectors
from hooked_vlm.toys.pages import make_page
from hooked_vlm.viewer.attention_view import attention
from hooked_vlm.viewer.session import Asked, Picture, Session
from hooked_vlm.viewer.view import Head, View
from hooked_vlm.viewer.vision_view import vision_attention

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

ONLY_WRITTEN = ("out", "answer", "box", "tower")
"""Settings of the written page that the served one does not have."""


def answer(config: ViewConfig) -> tuple[str, dict[str, Any]]:
    """Write or serve the page; what `hooked-vlm view` prints, and the same as data."""
    if config.serve:
        serve_page(config)
        return "", {}
    page = write_page(config)
    return f"page: {page}", {"page": str(page)}


def write_page(config: ViewConfig) -> Path:
    """Make the page, write it and open it.

    Raises:
        InputError, ImageError, CheckpointError, GeometryError, OutputError: what a user can mend.
    """
    if not config.image:
        raise InputError("--image needs a picture file")
    if config.steer is not None:
        raise InputError("--steer is of the page that is served: add --serve")
    if not config.prompt:
        raise InputError("--prompt needs a question about the picture")
    heads = [_head(name) for name in config.heads]
    if len(config.box) % 4:
        raise InputError(f"--box takes four numbers for each box, x0 y0 x1 y1, got {len(config.box)}")
    writable_folder(config.out.parent)
    _view(config, load(config.model, config.device, config.dtype), heads).save(config.out)
    if config.open:
        webbrowser.open(config.out.resolve().as_uri())
    return config.out


def serve_page(config: ViewConfig) -> None:
    """Serve the page until interrupted. A toy model begins with a page of its own kind where no picture is named.

    Raises:
        InputError, ImageError, CheckpointError: what a user can mend.
    """
    if find_spec("nicegui") is None:
        raise InputError("--serve needs NiceGUI: pip install 'hooked-vlm[serve]'")
    for field in fields(config):
        if field.name in ONLY_WRITTEN and getattr(config, field.name) != field.default:
            raise InputError(f"--{field.name} is of the page that is written: leave it out with --serve")
    if len(config.image) > 1:
        raise InputError(f"--serve begins with one picture, got {len(config.image)}")
    heads = tuple(_head(name) for name in config.heads)
    picture, prompt = None, config.prompt
    if config.image:
        picture = Picture(config.image[0].name, load_image(config.image[0]))
    elif config.model.startswith("toy-"):
        page = make_page(np.random.default_rng(7), n_lines=4)
        picture, prompt = Picture("example", page.image), config.prompt or page.question(2)
    from hooked_vlm.viewer.server import serve  # NiceGUI is an extra

    model = load(config.model, config.device, config.dtype)
    session = Session(
        model,
        max_pixels=config.max_pixels,
        max_tiles=config.max_tiles,
        ranked=heads,
        query=config.query,
        steering=None if config.steer is None else SteeringVectors.load(config.steer, model),
    )
    serve(session, Asked(picture, prompt, config.max_new_tokens), config.port, config.open)


def _view(config: ViewConfig, model: "HookedVLM", heads: list[Head]) -> View:
    pictures = [str(path) for path in config.image]
    inputs = model.to_inputs(config.prompt, images=pictures, max_pixels=config.max_pixels, max_tiles=config.max_tiles)
    boxes = [config.box[i : i + 4] for i in range(0, len(config.box), 4)]
    if config.tower == "vision":
        return vision_attention(model, inputs, images=pictures, boxes=boxes)
    return attention(
        model,
        inputs,
        config.answer,
        heads,
        boxes,
        images=pictures,
        query=config.query,
        max_new_tokens=config.max_new_tokens,
    )


def _head(name: str) -> Head:
    layer, dot, head = name.partition(".")
    if not (dot and layer.isdigit() and head.isdigit()):
        raise InputError(f"--heads takes heads as LAYER.HEAD, such as 2.1, got {name!r}")
    return int(layer), int(head)
