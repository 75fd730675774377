"""Pictures in every form that users have at hand, read alike or refused."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_qwen2_vl import reading_model
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hooked_vlm import ImageError
from hooked_vlm.inputs import files
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.images import load_image

COLOURS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
PICTURE = Image.fromarray(COLOURS)


def png(image: Image.Image = PICTURE) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a picture, 100%.png"
    path.write_bytes(png())
    return path


# ---------------------------------------------------------------- files

SOURCES = {
    "path": lambda path: path,
    "string": str,
    "file URI as Qwen writes it": lambda path: f"file://{path}",
    "file URI with percent signs": lambda path: path.as_uri(),
    "FILE URI": lambda path: f"FILE://{path}",
    "data URI": lambda path: "data:image/png;base64," + base64.b64encode(png()).decode(),
    "data URI without subtype": lambda path: "data:image;base64," + base64.b64encode(png()).decode(),
    "data URI with percent signs": lambda path: "DATA:image/png," + "".join(f"%{byte:02x}" for byte in png()),
    "bytes": lambda path: png(),
    "bytearray": lambda path: bytearray(png()),
    "memoryview": lambda path: memoryview(png()),
    "BytesIO": lambda path: io.BytesIO(png()),
    "datasets, bytes": lambda path: {"bytes": png(), "path": None},
    "datasets, bytes of a file elsewhere": lambda path: {"bytes": png(), "path": "not here.png"},
    "datasets, path": lambda path: {"bytes": None, "path": str(path)},
    "a path alone": lambda path: {"path": path},
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_is_its_picture_in_every_form(path: Path, source: str) -> None:
    assert np.array_equal(np.array(load_image(SOURCES[source](path))), COLOURS)


@pytest.mark.parametrize("source", SOURCES)
def test_every_form_is_one_picture_of_a_prompt_and_one_of_a_list(path: Path, source: str) -> None:
    model = reading_model()
    for images in (SOURCES[source](path), [SOURCES[source](path)], (SOURCES[source](path),)):
        assert torch.equal(
            model.to_inputs("a", images=images).pixel_values, model.to_inputs("a", images=PICTURE).pixel_values
        )


def test_an_open_file_is_read_from_its_beginning_and_left_where_it_was(path: Path) -> None:
    with path.open("rb") as file:
        file.seek(7)
        assert np.array_equal(np.array(load_image(file)), COLOURS) and file.tell() == 7
    written = io.BytesIO()
    PICTURE.save(written, "PNG")  # the position is at the end
    assert np.array_equal(np.array(load_image(written)), COLOURS)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"", "empty"),
        (io.BytesIO(), "empty"),
        (b"no picture", "Pillow"),
        (png()[:200], "truncated|Pillow"),
        (io.StringIO("text"), "'rb'"),
        ({"bytes": None, "path": None}, "bytes"),
        ({"image": PICTURE}, "image"),
        ({"bytes": png(), "path": None, "caption": "a"}, "caption"),
        ({}, "bytes"),
        ({"bytes": 5, "path": None}, "int"),
        ({"bytes": None, "path": True}, "bool"),
        ("data:image/png;base64,\ud800", "base64"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,AAA", "base64"),
        ("data:image/png;base64,é", "base64|Pillow"),
        ("file://not/here.png", "does not exist"),
        ("https://example.org/a.png", "allow_remote"),
        ("http://example.org/a.png", "allow_remote"),
        ("HTTPS://example.org/a.png", "allow_remote"),
        ({"bytes": None, "path": "https://example.org/a.png"}, "allow_remote"),
        ("ftp://example.org/a.png", "does not exist"),
        ("", "does not exist"),
    ],
)
def test_what_is_no_picture_is_refused(source: Any, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        load_image(source)


def test_a_closed_or_endless_file_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = path.open("rb")
    closed.close()
    with pytest.raises(ImageError, match="'rb'"):
        load_image(closed)
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    with open("/dev/zero", "rb") as endless, pytest.raises(ImageError, match="more than"):
        load_image(endless)


# ---------------------------------------------------------------- arrays and tensors

AS_UINT8 = {
    "channels last": COLOURS,
    "channels first": COLOURS.transpose(2, 0, 1),
    "tensor": torch.from_numpy(COLOURS),
    "tensor, channels first": torch.from_numpy(COLOURS).permute(2, 0, 1),
}
FORMS: dict[str, Any] = dict(AS_UINT8)
for name, values in AS_UINT8.items():
    for dtype in ("float16", "float32", "float64"):
        floats = values / 255  # float64, or a float32 tensor
        FORMS[f"{dtype}, {name}"] = (
            floats.astype(dtype) if isinstance(floats, np.ndarray) else floats.to(getattr(torch, dtype))
        )
FORMS["levels as floats, array"] = COLOURS.astype(np.float32)
FORMS["levels as floats, tensor"] = torch.from_numpy(COLOURS).float().permute(2, 0, 1)
FORMS["with gradients"] = (torch.from_numpy(COLOURS) / 255).requires_grad_()


@pytest.mark.parametrize("form", FORMS)
def test_an_array_is_the_picture_of_its_levels(form: str) -> None:
    assert np.array_equal(np.array(load_image(FORMS[form])), COLOURS)


@pytest.mark.parametrize("form", FORMS)
def test_pixel_values_of_an_array_are_those_of_the_pillow_processor(form: str) -> None:
    reference = Qwen2VLImageProcessorPil()(PICTURE, return_tensors="pt")
    assert torch.equal(ImageProcessor(max_pixels=1003520)([FORMS[form]])[0], reference["pixel_values"])


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize("first", [False, True])
def test_grey_and_transparent_arrays_are_taken_in_either_order(channels: int, scale: int, first: bool) -> None:
    levels = np.random.default_rng(1).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    expected = load_image(Image.fromarray(levels[:, :, 0] if channels == 1 else levels))
    array = levels if scale == 1 else levels / np.float32(255)
    assert load_image(array.transpose(2, 0, 1) if first else array) == expected


def test_a_float_between_two_levels_is_the_nearer_one() -> None:
    levels = np.linspace(0, 1, 1000).reshape(40, 25)
    assert (np.array(load_image(levels))[..., 0] == np.floor(levels * 255 + 0.5)).all()


def test_bfloat16_is_taken() -> None:
    tensor = (torch.from_numpy(COLOURS) / 255).bfloat16()
    difference = np.array(load_image(tensor)).astype(int) - COLOURS
    assert abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((3, 5, 3), np.uint8), "may be"),
        (np.zeros((4, 5, 3), np.uint8), "may be"),
        (np.zeros((1, 5, 4), np.uint8), "may be"),
        (torch.zeros(3, 3, 3), "may be"),
        (np.zeros((5, 5, 2), np.uint8), "channels"),
        (np.zeros((2, 5, 5), np.uint8), "channels"),
        (np.zeros((4, 8, 8, 3), np.uint8), "one picture"),
        (np.zeros(5, np.uint8), r"\(5,\)"),
        (np.zeros((0, 5, 3), np.uint8), "pixels"),
        (np.zeros((5, 5, 3), np.int64), "int64"),
        (np.zeros((5, 5, 3), np.uint16), "uint16"),
        (np.zeros((5, 5, 3), bool), "bool"),
        (torch.zeros(5, 5, 3, dtype=torch.int32), "int32"),
        (np.zeros((5, 5, 3), complex), "complex"),
        (np.ones((5, 5, 3), np.float32), "0 or 1"),
        (np.eye(5), "0 or 1"),
        (np.full((5, 5, 3), 1.5), "fractions"),
        (np.full((5, 5, 3), -0.1), "-0.1"),
        (np.full((5, 5, 3), 300.0), "300"),
        (np.full((5, 5, 3), np.nan), "nan"),
        (np.full((5, 5, 3), np.inf), "inf"),
    ],
)
def test_an_array_that_could_mean_two_things_or_none_is_refused(array: Any, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        load_image(array)


def test_black_has_no_scale_to_mistake() -> None:
    assert load_image(np.zeros((5, 6, 3), np.float32)) == Image.new("RGB", (6, 5))
