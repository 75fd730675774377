"""Videos as frames, arrays and files, sampled and resized as Qwen's reader of messages does."""

import io
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import bundled
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_qwen2_vl import reading_model

from hooked_vlm import ImageError, InputError
from hooked_vlm.inputs import videos
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.picture_settings import PictureSettings
from hooked_vlm.inputs.videos import Clip, open_video

needs_av = pytest.mark.skipif(find_spec("av") is None, reason="PyAV is missing: pip install 'hooked-vlm[video]'")
TEXT = {"type": "text", "text": "a"}


def frames(n: int, width: int = 48, height: int = 32) -> np.ndarray:
    """[frame, height, width, 3], each of another colour in every 8 x 8 block."""
    blocks = np.random.default_rng(0).integers(0, 256, (n, height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, 1).repeat(8, 2)


def levels_of(clip: Clip) -> np.ndarray:
    """[frame, height, width, 3]"""
    return np.stack([np.array(frame) for frame in clip.frames])


def part(video: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "video", "video": video, **more}, TEXT]}]


@pytest.fixture
def model() -> Any:
    return reading_model()


# ---------------------------------------------------------------- frames and arrays

CLIP = frames(4)
FORMS: dict[str, Callable[[Path], Any]] = {
    "PIL images": lambda path: [Image.fromarray(frame) for frame in CLIP],
    "arrays": lambda path: list(CLIP),
    "tuple": lambda path: tuple(CLIP),
    "tensors, channels first": lambda path: list(torch.from_numpy(CLIP).permute(0, 3, 1, 2)),
    "paths": lambda path: [path / f"{i}.png" for i in range(4)],
    "names": lambda path: [str(path / f"{i}.png") for i in range(4)],
    "file URIs": lambda path: [f"file://{path}/{i}.png" for i in range(4)],
    "bytes": lambda path: [(path / f"{i}.png").read_bytes() for i in range(4)],
    "datasets": lambda path: [{"bytes": None, "path": str(path / f"{i}.png")} for i in range(4)],
    "mixed": lambda path: [path / "0.png", CLIP[1], torch.from_numpy(CLIP[2]) / 255, Image.fromarray(CLIP[3])],
    "4-D array": lambda path: CLIP,
    "4-D array, channels first": lambda path: CLIP.transpose(0, 3, 1, 2),
    "4-D tensor": lambda path: torch.from_numpy(CLIP),
    "4-D floats": lambda path: CLIP / np.float32(255),
    "4-D float tensor of levels, as of qwen-vl-utils": lambda path: torch.from_numpy(CLIP).permute(0, 3, 1, 2) * 1.0,
}


@pytest.mark.parametrize("where", ["videos=", "videos=[]", "message", "batch"])
@pytest.mark.parametrize("form", FORMS)
def test_a_video_is_the_same_in_every_form(tmp_path: Path, model: Any, form: str, where: str) -> None:
    for i, frame in enumerate(CLIP):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    video = FORMS[form](tmp_path)
    inputs = {
        "videos=": lambda: model.to_inputs("a", videos=video),
        "videos=[]": lambda: model.to_inputs("a", videos=[video]),
        "message": lambda: model.to_inputs(part(video)),
        "batch": lambda: model.to_inputs(["a", "a"], videos=[None, [video]])[1],
    }[where]()
    pixels, grid, _ = model.image_processor.video([Image.fromarray(frame) for frame in CLIP])
    assert torch.equal(inputs.pixel_values_videos, pixels)
    assert torch.equal(inputs.video_grid_thw, grid)


def test_a_list_of_videos_is_several(model: Any) -> None:
    one, two = frames(2), frames(4)
    inputs = model.to_inputs("a", videos=[one, two])
    assert inputs.video_grid_thw[:, 0].tolist() == [1, 2]
    assert torch.equal(
        inputs.pixel_values_videos, model.to_inputs("a", videos=[list(one), list(two)]).pixel_values_videos
    )


@pytest.mark.parametrize(
    ("settings", "bounds"),
    [
        ({"max_pixels": 1024}, {"max_pixels": 1024}),
        ({"min_pixels": 4096}, {"min_pixels": 4096}),
        ({"total_pixels": 2048}, {"max_pixels": 1024}),  # two temporal patches
        ({"total_pixels": 1, "min_pixels": 1024}, {"min_pixels": 1024, "max_pixels": 1075}),  # at least 1.05 min_pixels
        ({"fps": 1.0}, {}),  # the rate of frames that are all used
    ],
)
def test_settings_of_frames_are_those_of_images(model: Any, settings: dict[str, Any], bounds: dict[str, Any]) -> None:
    pixels, grid, _ = model.image_processor.video(list(CLIP), **bounds)
    inputs = model.to_inputs(part(CLIP, **settings))
    assert torch.equal(inputs.pixel_values_videos, pixels) and torch.equal(inputs.video_grid_thw, grid)


def test_resized_frames_need_no_aspect_ratio(model: Any) -> None:
    inputs = model.to_inputs(part(CLIP, resized_height=16, resized_width=62))
    assert inputs.video_grid_thw.tolist() == [[2, 4, 16]]


@pytest.mark.parametrize(
    ("video", "says"),
    [
        ("clip.mp4", "does not exist"),
        (["clip.mp4", "other.mov"], "does not exist"),
        ("https://example.org/clip.mp4", "allow_remote"),
        ("data:video/mp4;base64,%%%", "base64"),
        (b"", "empty"),
        (["clip.mp4", CLIP[0]], "frame"),
        ([CLIP, CLIP[0]], "frame"),
        (CLIP[0], "4 axes"),
        (np.zeros((2, 3, 5, 3), np.uint8), "may be"),
        (np.zeros((0, 8, 8, 3), np.uint8), "pixels"),
        ([[]], "at least one frame"),
        ([CLIP[0], "missing.png"], "frame 1"),
        ([CLIP[0], 3], "frame 1"),
        (5, "video"),
        ([CLIP[0], CLIP[0][:8]], "one size"),
    ],
)
def test_what_is_no_video_is_refused(model: Any, video: Any, says: str) -> None:
    with pytest.raises((ImageError, InputError), match=says):
        model.to_inputs("a", videos=video)


@pytest.mark.parametrize("video", [CLIP, list(CLIP)])
def test_a_model_that_tiles_images_takes_no_videos(video: Any) -> None:
    with pytest.raises(InputError, match="frames as images"):
        bundled("toy-internvl2").to_inputs("a", videos=video)


def test_without_pyav_the_error_says_what_to_install(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"anything")
    monkeypatch.setattr(videos, "find_spec", lambda name: None)
    for video in (tmp_path / "clip.mp4", b"anything", io.BytesIO(b"anything"), {"bytes": b"anything", "path": None}):
        with pytest.raises(ImageError, match=r"hooked-vlm\[video\]"):
            model.to_inputs("a", videos=video)


# ---------------------------------------------------------------- sampling and sizes of files


def sampled(n_frames: int, rate: float, **given: Any) -> list[int] | None:
    """`smart_nframes` of qwen-vl-utils and the frames that it takes, from its documentation; None: refused."""
    if "nframes" in given:
        n = 2 * round(given["nframes"] / 2)
    else:
        least = 2 * math.ceil(given.get("min_frames", 4) / 2)
        most = 2 * (given.get("max_frames", min(768, n_frames)) // 2)
        n = 2 * math.floor(min(max(given.get("fps", 2.0) * n_frames / rate, least), most, n_frames) / 2)
    return torch.linspace(0, n_frames - 1, n).round().int().tolist() if 2 <= n <= n_frames else None


samplings = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"nframes": st.integers(1, 900)}),
    st.fixed_dictionaries(
        {},
        optional={
            "fps": st.sampled_from([0.1, 0.5, 1, 2.0, 25]),
            "min_frames": st.integers(1, 60),
            "max_frames": st.integers(1, 900),
        },
    ),
)


@settings(max_examples=200)
@given(st.integers(1, 3000), st.sampled_from([1.0, 12.0, 23.976, 25.0, 30.0, 60.0]), samplings)
def test_frames_are_sampled_as_qwens_reader_samples_them(n_frames: int, rate: float, given: dict[str, Any]) -> None:
    expected = sampled(n_frames, rate, **given)
    own = PictureSettings(**given)
    if expected is None:
        with pytest.raises(ImageError, match="frames"):
            own.frame_numbers(n_frames, rate, 2)
    else:
        assert own.frame_numbers(n_frames, rate, 2) == expected


def test_a_file_without_a_rate_needs_a_number_of_frames() -> None:
    with pytest.raises(ImageError, match="nframes"):
        PictureSettings().frame_numbers(10, None, 2)
    assert PictureSettings(nframes=4).frame_numbers(10, None, 2) == [0, 3, 6, 9]


@pytest.mark.parametrize(
    ("n_frames", "given", "expected"),
    [  # (height, width) for frames of 1080 x 1920, worked out from fetch_video of qwen-vl-utils
        (4, {}, (560, 1008)),  # 768 tokens: 20.8 x 36.9 of them, floored
        (768, {}, (336, 644)),  # 115200 tokens / 384 temporal patches = 300: 12.99 x 23.1
        (768, {"total_pixels": 784}, (224, 420)),  # at least 1.05 * 128 tokens: 8.7 x 15.5
        (4, {"max_pixels": 28 * 28 * 200}, (280, 504)),
        (4, {"max_pixels": 28 * 28 * 5000}, (560, 1008)),  # more than 768 tokens are not to be had
        (768, {"min_pixels": 28 * 28 * 600}, (504, 924)),  # 1.05 * 600 tokens: 18.8 x 33.5
        (4, {"resized_height": 100, "resized_width": 300}, (112, 308)),
    ],
)
def test_frames_of_a_file_are_bounded_as_qwens_reader_bounds_them(
    n_frames: int, given: dict[str, int], expected: tuple[int, int]
) -> None:
    assert PictureSettings(**given).frame_size(1920, 1080, ImageProcessor(), n_frames, True) == expected


def test_frames_of_a_file_stay_within_the_checkpoints_largest_area() -> None:
    small = ImageProcessor(max_pixels=28 * 28 * 50)
    height, width = PictureSettings().frame_size(1920, 1080, small, 4, True)
    assert height * width <= 28 * 28 * 50


# ---------------------------------------------------------------- files


def write(path: Path, clip: np.ndarray, rate: int = 4, codec: str = "ffv1", pixels: str = "bgr0") -> Path:
    """A video file of these frames; the default codec loses nothing."""
    import av  # pyright: ignore[reportMissingImports]

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = pixels
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@needs_av
@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ({}, None),
        ({"fps": 1.0}, None),
        ({"fps": 4}, None),
        ({"nframes": 6}, [0, 4, 8, 12, 16, 20]),
        ({"nframes": 2}, [0, 20]),
        ({"min_frames": 14}, None),
        ({"max_frames": 4}, [0, 7, 13, 20]),
    ],
)
def test_the_sampled_frames_of_a_file_are_those_frames(
    tmp_path: Path, given: dict[str, Any], numbers: list[int] | None
) -> None:
    clip = frames(21)
    path = write(tmp_path / "clip.mkv", clip)
    numbers = numbers or sampled(21, 4.0, **given)
    opened = open_video(path, PictureSettings(**given), ImageProcessor())
    assert opened.n_frames == len(numbers or []) and opened.size == (48, 32)
    assert np.array_equal(levels_of(opened), clip[numbers])


@needs_av
@pytest.mark.parametrize("form", ["name", "path", "file URI", "bytes", "file object", "datasets", "url", "data URI"])
def test_a_video_file_in_every_form_is_its_sampled_frames(tmp_path: Path, model: Any, form: str) -> None:
    import base64

    clip = frames(8)
    path = write(tmp_path / "a clip.mkv", clip)
    data = path.read_bytes()
    source = {
        "name": str(path), "path": path, "file URI": path.as_uri(), "bytes": data, "file object": io.BytesIO(data),
        "datasets": {"bytes": data, "path": None}, "url": str(path),
        "data URI": "data:video/x-matroska;base64," + base64.b64encode(data).decode(),
    }[form]  # fmt: skip
    message = part(source, nframes=4, max_pixels=1024)
    if form == "url":
        message[0]["content"][0] = {"type": "video_url", "video_url": {"url": source}, "nframes": 4, "max_pixels": 1024}
    inputs = model.to_inputs(message)
    expected = model.to_inputs(part(clip[[0, 2, 5, 7]], resized_height=24, resized_width=32))
    assert inputs.video_grid_thw.tolist() == [[2, 6, 8]]
    assert torch.equal(inputs.pixel_values_videos, expected.pixel_values_videos)
    assert torch.equal(inputs.position_ids, expected.position_ids)


@needs_av
def test_bounds_of_a_call_hold_for_video_files_that_have_none(tmp_path: Path, model: Any) -> None:
    path = write(tmp_path / "clip.mkv", frames(8))
    called = model.to_inputs(part(path, nframes=4), max_pixels=1024)
    assert torch.equal(
        called.pixel_values_videos, model.to_inputs(part(path, nframes=4, max_pixels=1024)).pixel_values_videos
    )
    assert torch.equal(called.tokens, model.to_inputs("a", videos=[path], max_pixels=1024).tokens)


@needs_av
@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("gif", "gif")]
)
def test_common_formats_are_read_with_their_number_of_frames(tmp_path: Path, suffix: str, codec: str) -> None:
    clip = np.stack([np.full((32, 48, 3), 20 * i, np.uint8) for i in range(12)])
    path = write(tmp_path / f"clip.{suffix}", clip, codec=codec, pixels="rgb8" if suffix == "gif" else "yuv420p")
    opened = open_video(path, PictureSettings(nframes=12), ImageProcessor())
    levels = levels_of(opened).mean((1, 2, 3))
    assert len(levels) == 12 and abs(levels - 20 * np.arange(12)).max() < 20
    assert (np.diff(levels) > 0).all()


@needs_av
@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_turned_video_is_upright(tmp_path: Path, turn: int) -> None:
    clip = frames(4)
    path = write(tmp_path / "clip.mp4", clip, codec="libx264", pixels="yuv420p")
    plain = levels_of(open_video(path, PictureSettings(nframes=4), ImageProcessor()))
    data = bytearray(path.read_bytes())
    # the matrix of the track header: clockwise by `turn` (ISO/IEC 14496-12, tkhd: 9 numbers, the first four here)
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[turn]
    at = data.index(b"tkhd") + 4 + 40
    for i, number in zip((0, 1, 3, 4), matrix, strict=True):
        data[at + 4 * i : at + 4 * i + 4] = (number * 65536).to_bytes(4, "big", signed=True)
    turned = levels_of(open_video(bytes(data), PictureSettings(nframes=4), ImageProcessor()))
    assert np.array_equal(turned, np.rot90(plain, -turn // 90, axes=(1, 2)))


@needs_av
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("clip.mp4", b"no video at all"),
        ("clip.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.mkv\n#EXT-X-ENDLIST\n"),
        ("clip.ffconcat", b"ffconcat version 1.0\nfile clip.mkv\n"),
        ("clip.sdp", b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"),
        ("picture.png", None),
    ],
)
def test_what_is_no_video_file_or_names_other_files_is_refused(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    write(tmp_path / "clip.mkv", frames(4))
    if content is None:
        Image.fromarray(CLIP[0]).save(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match="PyAV can read"):
        open_video(tmp_path / name, PictureSettings(), ImageProcessor())


@needs_av
def test_a_damaged_file_is_refused_or_read_but_never_fails_otherwise(tmp_path: Path) -> None:
    whole = write(tmp_path / "clip.mp4", frames(6), codec="libx264", pixels="yuv420p").read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        damaged = bytearray(whole)
        for place in random.integers(0, len(damaged), random.integers(1, 60)):
            damaged[place] = random.integers(256)
        try:
            list(open_video(bytes(damaged[: random.integers(len(whole))]), PictureSettings(), ImageProcessor()).frames)
        except ImageError:
            refused += 1
    assert refused > 5


@needs_av
def test_one_frame_is_no_video_to_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mkv", frames(1))
    with pytest.raises(ImageError, match="frames"):
        open_video(path, PictureSettings(), ImageProcessor())


@needs_av
def test_frames_beyond_pillows_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mkv", frames(4))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="MAX_IMAGE_PIXELS"):
        open_video(path, PictureSettings(), ImageProcessor())
