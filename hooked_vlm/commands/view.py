"""`hooked-vlm view`: where a model looks in a picture, written as a page and opened, or served and asked again."""

import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.images import load_image
from hooked_vlm.model.by_name import load
from hooked_vlm.runtime.files import writable_folder
from hooked_vlm.viewer.attention_view import attention
from hooked_vlm.viewer.session import Asked, Picture, Session
from hooked_vlm.viewer.view import Head, View
from hooked_vlm.viewer.vision_view import vision_attention

ONLY_WRITTEN = ("out", "answer", "box", "tower")
"""Settings of the written page that the served one does not have."""


@dataclass(frozen=True)
class ViewConfig:
    """One prompt with its pictures, and what to show of it."""

    image: tuple[Path, ...] = ()
    """Picture files, in the order of the prompt; with --serve one, or none, to begin with."""
    prompt: str = ""
    """With --serve what stands in the page at first."""
    model: str = "toy-qwen2-vl"
    """A bundled toy model, a checkpoint folder or a hub name such as Qwen/Qwen2-VL-2B-Instruct."""
    out: Path = Path("attention.html")
    """The page."""
    answer: str | None = None
    """Text whose tokens are shown; by default the model's greedy answer."""
    heads: tuple[str, ...] = ()
    """Heads to step through, best first, as LAYER.HEAD: --heads 2.1 2.0"""
    box: tuple[float, ...] = ()
    """Evidence boxes in the first picture, x0 y0 x1 y1 each, in its pixels."""
    query: Literal["producing", "token"] = "producing"
    """A token shows the attention of the position that predicted it, or its own."""
    tower: Literal["language", "vision"] = "language"
    """vision: which patches of the first picture look at which, in the vision tower."""
    max_new_tokens: int = 32
    """How long the answer may get."""
    max_pixels: int | None = None
    """Bound on the area of the resized picture (Qwen2-VL); the checkpoint's by default."""
    max_tiles: int | None = None
    """How many tiles a picture is cut into at most (InternVL); the checkpoint's by default."""
    serve: bool = False
    """Instead of writing a page, serve one on 127.0.0.1 in which picture, prompt and heads can be changed."""
    port: int = 0
    """Where the page is served; 0 takes any free port."""
    open: bool = True
    """Show the page in the browser."""
    device: str | None = None
    """CUDA if present by default; "auto" spreads the model over what there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The checkpoint's own by default."""


def write_page(config: ViewConfig) -> Path:
    """Make the page, write it and open it.

    Raises:
        InputError, ImageError, CheckpointError, GeometryError, OutputError: what a user can mend.
    """
    if not config.image:
        raise InputError("--image needs a picture file")
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


def serve_page(config: ViewConfig, example: Callable[[], tuple[Image.Image, str]]) -> None:
    """Serve the page until interrupted.

    Args:
        example: makes a picture and a question, which a toy model begins with where no picture is named.

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
        image, question = example()
        picture, prompt = Picture("example", image), config.prompt or question
    from hooked_vlm.viewer.serve import serve  # NiceGUI is an extra

    model = load(config.model, config.device, config.dtype)
    session = Session(model, max_pixels=config.max_pixels, max_tiles=config.max_tiles, ranked=heads, query=config.query)
    serve(session, Asked(picture, prompt, config.max_new_tokens), config.port, config.open)


def _view(config: ViewConfig, model: Any, heads: list[Head]) -> View:
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
