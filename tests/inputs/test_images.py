"""Pixel values equal the reference's bit for bit; every kind of bad image is refused in one sentence."""

import io
import json
import random
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_smart_resize

from hooked_vlm.errors import ImageError
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.image_settings import CLIP_MEAN, CLIP_STD
from hooked_vlm.inputs.images import load_image, load_image_bytes
from hooked_vlm.inputs.layouts import whole_layout
from hooked_vlm.inputs.resizing import smart_resize

SMALL: dict[str, Any] = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 40}


def noise(width, height, channels=3, seed=0, dtype: Any = np.uint8):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def picture(mode, width=61, height=47, seed=0):
    """A noise image of any 8-bit mode."""
    rgba = Image.fromarray(noise(width, height, 4, seed))
    if mode == "P+transparency":
        image = rgba.convert("RGB").quantize(16)
        image.info["transparency"] = bytes(range(0, 256, 16))
        return image
    if mode == "RGB+transparency":
        image = rgba.convert("RGB")
        image.info["transparency"] = image.getpixel((3, 3))
        return image
    if mode in ("PA", "RGBa", "LA", "RGBA", "RGBX"):
        return (rgba.convert("LA") if mode == "PA" else rgba).convert(mode)
    return rgba.convert("RGB").convert(mode)


def assert_equals_reference(images, sizes=None, **bounds):
    bounds = SMALL | bounds
    pixel_values, grid_thw, layouts = ImageProcessor(**bounds)(images)
    reference = Qwen2VLImageProcessorPil(**bounds)(images, return_tensors="np")
    assert pixel_values.dtype == torch.float32 and grid_thw.dtype == torch.int64
    np.testing.assert_array_equal(grid_thw, reference["image_grid_thw"])
    np.testing.assert_array_equal(pixel_values, reference["pixel_values"])
    assert [layout.image_size for layout in layouts] == (sizes or [image.size for image in images])


# ---- equal to the reference ----


@given(st.integers(1, 1500), st.integers(1, 1500), st.integers(1, 30), st.integers(1, 300))
def test_smart_resize_is_the_references(height, width, min_tokens, more_tokens):
    bounds = min_tokens * 784, (min_tokens + more_tokens) * 784
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ImageError, match=r"\b200\b"):
            smart_resize(height, width, 28, *bounds)
    else:
        assert smart_resize(height, width, 28, *bounds) == reference_smart_resize(height, width, 28, *bounds)


def test_smart_resize_rounds_halves_to_even():
    assert smart_resize(70, 98, 28, 1, 10**9) == (56, 112)


@settings(max_examples=60)
@given(
    st.sampled_from(["RGB", "L", "P", "RGBA", "LA"]),
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(1, 12),
    st.integers(0, 40),
)
def test_pixel_values_are_the_references(mode, width, height, min_tokens, more_tokens):
    bounds = {"min_pixels": min_tokens * 784, "max_pixels": (min_tokens + more_tokens) * 784}
    assert_equals_reference([picture(mode, width, height, seed=width)], **bounds)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"]


@pytest.mark.parametrize("mode", [*MODES, "P+transparency", "RGB+transparency"])
def test_every_mode_is_converted_as_the_reference_does(mode):
    assert_equals_reference([picture(mode)])


def test_images_of_different_sizes_in_one_call():
    assert_equals_reference([picture("RGB", 30, 200), picture("L", 150, 20), picture("RGBA", 56, 56)])


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 500), (28, 28), (2000, 10)])
def test_extreme_sizes_are_resized_as_the_reference_does(size):
    assert_equals_reference([picture("RGB", *size)])


@pytest.mark.parametrize("shape", [(40, 50, 3), (40, 50, 4), (40, 50), (40, 50, 1)])
def test_arrays_and_tensors_are_taken_as_the_reference_takes_arrays(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    mine = ImageProcessor(**SMALL)
    # the reference takes one-channel arrays for channels-first unless the axis is given, and no bare (h, w)
    as_hwc = array.reshape(40, 50, -1)
    reference = Qwen2VLImageProcessorPil(**SMALL)(
        as_hwc if as_hwc.shape[2] > 1 else as_hwc.repeat(3, 2),
        input_data_format="channels_last",
        return_tensors="np",
    )
    for image in (array, torch.from_numpy(array), np.asfortranarray(array)):
        np.testing.assert_array_equal(mine([image])[0], reference["pixel_values"])


def test_other_patch_sizes_and_normalisation():
    settings: dict[str, Any] = {"patch_size": 8, "merge_size": 3, "temporal_patch_size": 3}
    settings |= {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.2, 0.3, 0.7)}
    image = picture("RGB", 100, 80)
    pixel_values, grid_thw, _ = ImageProcessor(**SMALL, **settings)([image])
    reference = Qwen2VLImageProcessorPil(**SMALL, **settings)([image], return_tensors="np")
    np.testing.assert_array_equal(pixel_values, reference["pixel_values"])
    np.testing.assert_array_equal(grid_thw, reference["image_grid_thw"])


def test_bounds_of_a_call_replace_those_of_the_processor():
    image = picture("RGB", 300, 200)
    wide, narrow = ImageProcessor(), ImageProcessor(**SMALL)
    assert torch.equal(wide([image], **SMALL)[0], narrow([image])[0])
    assert wide([image], max_pixels=784 * 10)[1].prod() <= 40
    assert wide([image])[1].tolist() == [[1, 14, 22]]


def test_no_images_give_empty_tensors():
    pixel_values, grid_thw, sizes = ImageProcessor()([])
    assert pixel_values.shape == (0, 1176) and grid_thw.shape == (0, 3) and sizes == []


def test_the_images_given_are_not_changed():
    for mode in ("RGB", "RGBA", "P", "L"):
        image = picture(mode)
        before, info = image.tobytes(), dict(image.info)
        ImageProcessor(**SMALL)([image])
        assert image.tobytes() == before and image.info == info and image.mode == mode


# ---- video ----


def literal_video(frames, processor):
    """Frames to patches by indexing, from the formulas of `transformers` 4.57: no reshape or transpose."""
    height, width = smart_resize(frames[0].height, frames[0].width, 28, processor.min_pixels, processor.max_pixels)
    frames = [np.array(frame.resize((width, height), Image.Resampling.BICUBIC)) for frame in frames]
    frames += frames[-1:] * (len(frames) % 2)
    video = np.stack(frames).astype(np.float64) * (1 / 255)
    mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
    video = (video.astype(np.float32) - mean) / std  # frame y x channel
    rows = []
    for t in range(len(frames) // 2):
        for block_y in range(height // 28):
            for block_x in range(width // 28):
                for patch_y in (0, 14):
                    for patch_x in (0, 14):
                        y, x = 28 * block_y + patch_y, 28 * block_x + patch_x
                        rows.append(
                            [
                                video[2 * t + frame, y : y + 14, x : x + 14, channel].ravel()
                                for channel in range(3)
                                for frame in range(2)
                            ]
                        )
    return np.array(rows, dtype=np.float32).reshape(len(rows), -1), (
        len(frames) // 2,
        height // 14,
        width // 14,
    )


@pytest.mark.parametrize("n_frames", [1, 2, 3, 6])
def test_a_video_is_cut_as_published(n_frames):
    processor = ImageProcessor(**SMALL)
    frames = [picture("RGB", 90, 60, seed) for seed in range(n_frames)]
    expected, grid = literal_video(frames, processor)
    pixel_values, grid_thw, sizes = processor.video(frames)
    np.testing.assert_array_equal(pixel_values, expected)
    assert grid_thw.tolist() == [list(grid)] and sizes == [(90, 60)]


def test_a_video_of_one_frame_is_the_image():
    image = picture("RGB")
    *of_video, (size,) = ImageProcessor().video([image])
    *of_image, (layout,) = ImageProcessor()([image])
    assert all(map(torch.equal, of_video, of_image)) and layout.image_size == size


def test_frames_may_be_of_any_kind(tmp_path):
    picture("RGB").save(tmp_path / "0.png")
    frames = [tmp_path / "0.png", np.array(picture("RGB")), torch.from_numpy(np.array(picture("RGB")))]
    pixel_values, grid_thw, _ = ImageProcessor(**SMALL).video(frames)
    assert grid_thw[0, 0] == 2
    assert torch.equal(*pixel_values.chunk(2))


# ---- patches and geometry ----


def test_each_row_of_pixel_values_is_the_patch_that_patch_order_names():
    """An image whose every patch has its own colour."""
    rows, cols = 6, 10
    colours = np.random.default_rng(0).permutation(256**3)[: rows * cols]
    colours = np.stack([colours % 256, colours // 256 % 256, colours // 65536], -1).astype(np.uint8)
    colours = colours.reshape(rows, cols, 3)
    image = colours.repeat(14, 0).repeat(14, 1)
    for pixel_values, grid_thw, sizes in (
        (*ImageProcessor()([image])[:2], [(140, 84)]),
        ImageProcessor().video([np.zeros_like(image), np.zeros_like(image), image]),
    ):
        grid = whole_layout(sizes[0], tuple(grid_thw[0].tolist()))
        assert grid.resized_size == (140, 84) == sizes[0]
        patches = pixel_values.reshape(-1, 3, 2, 14, 14)
        levels = patches * torch.tensor(CLIP_STD).reshape(3, 1, 1, 1) + torch.tensor(CLIP_MEAN).reshape(3, 1, 1, 1)
        seen = (levels * 255).round().to(torch.uint8).numpy()
        for (frame, row, col), patch in zip(grid.patch_order(), seen, strict=True):
            expected = colours[row, col] if frame == grid.frames - 1 else np.zeros(3)
            assert (patch == np.reshape(expected, (3, 1, 1, 1))).all()


# ---- settings ----


PUBLISHED = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}


def test_settings_as_published_are_the_defaults():
    assert ImageProcessor.from_dict(PUBLISHED) == ImageProcessor() == ImageProcessor.from_dict({})


@pytest.mark.parametrize(
    "config",
    [
        {"min_pixels": 784, "max_pixels": 7840},
        {"size": {"shortest_edge": 784, "longest_edge": 7840}},
        {"size": {"min_pixels": 784, "max_pixels": 7840}},
        {"size": {"shortest_edge": 784, "longest_edge": 7840}, "min_pixels": None, "max_pixels": None},
        {"size": {"shortest_edge": 784, "longest_edge": 7840}, "min_pixels": 784, "max_pixels": 7840},
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "min_pixels": 784, "max_pixels": 7840},
        {"size": {"min_pixels": 3136, "max_pixels": 12845056}, "min_pixels": 784, "max_pixels": 7840},
        {"size": {"shortest_edge": 784, "longest_edge": 12845056}, "max_pixels": 7840},
        {"image_processor": {"min_pixels": 784, "max_pixels": 7840}, "processor_class": "Qwen2VLProcessor"},
    ],
)
def test_every_form_of_the_bounds_is_read(config):
    assert ImageProcessor.from_dict(config) == ImageProcessor(min_pixels=784, max_pixels=7840)


def test_settings_saved_by_transformers_are_read(tmp_path):
    Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=7840, patch_size=16).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert ImageProcessor.from_dict(saved) == ImageProcessor(16, min_pixels=784, max_pixels=7840)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"size": {"shortest_edge": 3136, "min_pixels": 784, "longest_edge": 7840}}, "contradict"),
        ({"min_pixels": 7840, "max_pixels": 784}, "min_pixels=7840.*max_pixels=784"),
        ({"min_pixels": 0}, "min_pixels"),
        ({"min_pixels": 1, "max_pixels": 700}, "max_pixels=700.*784"),
        ({"size": {"height": 224, "width": 224}}, "shortest_edge"),
        ({"size": 224}, "shortest_edge"),
        ({"do_normalize": False}, "do_normalize"),
        ({"resample": 2}, "resample"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"patch_size": 0}, "patch_size"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(config, says):
    with pytest.raises(ImageError, match=says):
        ImageProcessor.from_dict(config)


def test_bounds_of_a_call_are_checked():
    with pytest.raises(ImageError, match=r"min_pixels=3136.*max_pixels=1000"):
        ImageProcessor()([picture("RGB")], max_pixels=1000)


# ---- reading: where it is right to differ from the reference, or the reference has no say ----


def test_a_file_is_its_image(tmp_path):
    image = picture("RGB")
    image.save(tmp_path / "image.png")
    for path in (tmp_path / "image.png", str(tmp_path / "image.png")):
        assert load_image(path).tobytes() == image.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "tiff", "webp"])
def test_exif_orientation_is_applied_once(tmp_path, orientation, extension):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{extension}"
    picture("RGB", 30, 20).save(path, exif=exif)
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file).convert("RGB")
    with Image.open(path) as file:
        for source in (path, file):
            loaded = load_image(source)
            assert loaded.size == ((20, 30) if orientation > 4 else (30, 20))
            assert loaded.tobytes() == upright.tobytes()
            assert load_image(loaded).tobytes() == upright.tobytes(), "loading twice turned it twice"
    (layout,) = ImageProcessor(**SMALL)([path])[2]
    assert layout.image_size == upright.size


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P+transparency", "RGB+transparency"])
def test_transparent_files_are_laid_on_white(tmp_path, mode):
    image = picture(mode)
    image.save(tmp_path / "image.png")
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert alpha.min() < 0.1
    assert abs(np.asarray(load_image(tmp_path / "image.png")) - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("extension", ["png", "tiff", "pgm"])
def test_16_bit_greyscale_is_scaled_not_clipped(tmp_path, extension):
    levels = noise(40, 30, 1, dtype=np.uint16)
    path = tmp_path / f"image.{extension}"
    Image.fromarray(levels).save(path)
    expected = np.round(levels / 65535 * 255)
    sources = [path] if extension == "pgm" else [path, Image.fromarray(levels)]
    for source in sources:
        loaded = np.asarray(load_image(source))
        for channel in range(3):
            np.testing.assert_array_equal(loaded[..., channel], expected)


def test_16_bit_greyscale_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)).save(tmp_path / "image.png", exif=exif)
    assert np.asarray(load_image(tmp_path / "image.png"))[..., 0].tolist() == [[0], [255]]


def test_the_transparent_level_of_16_bit_greyscale_becomes_white(tmp_path):
    levels = np.array([[1000, 2000]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "image.png", transparency=1000)
    assert np.asarray(load_image(tmp_path / "image.png"))[0, :, 0].tolist() == [255, 8]


def test_8_bit_levels_survive_16_bits():
    levels = np.arange(256, dtype=np.uint16)[None] * 257
    np.testing.assert_array_equal(np.asarray(load_image(Image.fromarray(levels)))[0, :, 0], np.arange(256))


@pytest.mark.parametrize("extension", ["gif", "png", "webp", "tiff"])
def test_an_animated_file_is_its_first_frame(tmp_path, extension):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    path = tmp_path / f"image.{extension}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)  # for WebP; others ignore it
    assert load_image(path).getpixel((5, 5)) == (255, 0, 0)
    with Image.open(path) as file:
        file.seek(2)
        assert load_image(file).getpixel((5, 5)) == (0, 0, 255), "a PIL image is the frame it stands at"


# ---- reading: refusals ----


def png(width, height, rows=b""):
    """A PNG file that claims a size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(format):
    buffer = io.BytesIO()
    picture("RGB").save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes"),
        (b"just some text", "Pillow"),
        (encoded("PNG")[:20], "Pillow"),
        (encoded("PNG")[:1500], "truncated"),
        (encoded("JPEG")[:1500], "truncated"),
        (encoded("PNG").replace(b"IDAT", b"IDAX"), "truncated|Pillow"),
        (png(0, 0), "Pillow|pixels"),
        (png(5, 5), "truncated"),
        (png(60000, 60000), "MAX_IMAGE_PIXELS"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, content, says):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=says) as caught:
        load_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ImageError) as of_bytes:
        load_image_bytes(content, str(path))
    assert str(of_bytes.value) == str(caught.value)


def test_the_contents_of_a_file_are_read_as_the_file(tmp_path):
    (tmp_path / "image.png").write_bytes(encoded("PNG"))
    assert load_image_bytes(encoded("PNG"), "image.png") == load_image(tmp_path / "image.png")


def test_a_path_that_is_no_file_is_refused(tmp_path):
    for path, says in (
        (tmp_path / "missing.png", r"missing\.png"),
        (tmp_path, r"\bfolder\b"),
        ("https://example.org/image.png", "download"),
        ("iVBORw0KGgo" * 1000, r"\.\.\.'"),
        ("a\0b", r"a\\x00b"),
    ):
        with pytest.raises(ImageError, match=says):
            load_image(path)


def test_bad_objects_are_refused():
    closed = Image.open(io.BytesIO(encoded("PNG")))
    closed.close()
    for image, says in (
        (Image.new("RGB", (0, 5)), "pixels"),
        (np.zeros((0, 5, 3), np.uint8), "pixels"),
        (np.zeros((5, 5, 3), np.int32), "uint8.*int32"),
        (Image.new("F", (5, 5)), "'F'"),
        (Image.new("I", (5, 5)), "'I'"),
        (Image.open(io.BytesIO(encoded("PNG")[:1500])), "truncated"),
        (closed, "truncated"),
        (None, "NoneType"),
        (42, r"\bint\b"),
    ):
        with pytest.raises(ImageError, match=says) as caught:
            load_image(image)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_a_damaged_file_is_refused_or_read_but_never_fails_otherwise(tmp_path, format):
    whole, path, rng = encoded(format), tmp_path / "image", random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 3, 20])):
            damaged[min(int(rng.expovariate(1 / 200)), len(damaged) - 1)] = rng.randrange(256)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        with warnings.catch_warnings(action="ignore"):
            try:
                load_image(path)
            except ImageError:
                refused += 1
    assert refused > 5


def test_the_message_names_the_image_of_the_list(tmp_path):
    good = picture("RGB")
    with pytest.raises(ImageError, match=r"image 1.*missing\.png"):
        ImageProcessor()([good, tmp_path / "missing.png"])
    with pytest.raises(ImageError, match=r"image 2.*1 x 300"):
        ImageProcessor()([good, good, picture("RGB", 1, 300)])
    with pytest.raises(ImageError, match=r"frame 1.*uint8"):
        ImageProcessor().video([good, np.zeros((5, 5), int)])


def test_bad_videos_are_refused():
    with pytest.raises(ImageError, match="frame"):
        ImageProcessor().video([])
    with pytest.raises(ImageError, match=r"frame 2.*30 x 40.*frame 0.*40 x 30"):
        ImageProcessor().video([picture("RGB", 40, 30), picture("RGB", 40, 30), picture("RGB", 30, 40)])


def test_a_single_path_is_not_a_list():
    with pytest.raises(ImageError, match=r"\bstr\b"):
        ImageProcessor()("image.png")
