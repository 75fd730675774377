"""Settings that the image processors of all families share, from `preprocessor_config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from hooked_vlm.errors import CheckpointError, ImageError

PROCESSOR, IMAGES, VIDEOS = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Where a file is silent, the class of transformers decides: Qwen2VLImageProcessorPil, Qwen2VLVideoProcessor (if videos
# have settings of their own; else 4.x prepared them as images, with which the models were published)
SILENT_IMAGES = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
SILENT_VIDEOS = {"min_pixels": 128 * 28 * 28, "max_pixels": 28 * 28 * 768}
VIDEO_TOKENS = 128_000  # `max_video_tokens` of transformers' Qwen2VLVideoProcessor
# Of Qwen3-VL: as published (the bounds from memory), and Qwen3VLVideoProcessor where a file is silent
HALF = (0.5, 0.5, 0.5)
PUBLISHED_TOGETHER = {"min_pixels": 2**16, "max_pixels": 2**24, "image_mean": HALF, "image_std": HALF}
SILENT_TOGETHER = {"min_pixels": 128 * 32**2, "max_pixels": 768 * 32**2, "image_mean": HALF, "image_std": HALF}
TOKENS_TOGETHER = 768


@dataclass(frozen=True)
class Settings:
    """The settings of one processor in a checkpoint folder, and the file that they come from."""

    values: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None
    """None: no file has any."""

    def refusal(self, error: ImageError) -> CheckpointError:
        """The error of settings that are not supported, with the file that holds them."""
        where = "what config.json says of images" if self.file is None else f"{self.file} (or config.json)"
        return CheckpointError(f"{where}: {error}")


def processor_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The image processor's settings, which `processor_config.json` keeps in a section.

    Raises:
        ImageError: they are not an object.
    """
    settings = config.get("image_processor", config)
    if not isinstance(settings, Mapping):
        raise ImageError(f"image_processor must be an object, got {settings!r}")
    return settings


def whole(name: str, value: Any) -> int:
    """Check that `value` is a whole number of at least 1, and return it.

    Raises:
        ImageError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ImageError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def common_settings(
    config: Mapping[str, Any], resample: Image.Resampling | None = Image.Resampling.BICUBIC
) -> dict[str, tuple[float, ...]]:
    """`image_mean` and `image_std`, where stated; `resample` is the only filter that is supported, None: any is.

    Raises:
        ImageError: a step is switched off, or set to something not supported.
    """
    for key, expected in (
        ("do_resize", True),
        ("do_rescale", True),
        ("do_normalize", True),
        ("resample", config.get("resample") if resample is None else resample.value),
        ("rescale_factor", 1 / 255),
    ):
        if config.get(key) not in (None, expected):
            raise ImageError(f"unsupported image processor: expected {key} = {expected}, got {config[key]!r}")
    fields = {}
    for key in ("image_mean", "image_std"):
        if config.get(key) is not None:
            fields[key] = colours(key, config[key])
    return fields


def colours(name: str, values: Any) -> tuple[float, ...]:
    """Check `image_mean` or `image_std` (for colours between 0 and 1), and return it.

    Raises:
        ImageError: it is not three numbers, or `image_std` is not positive.
    """
    numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) and abs(v) <= 1e3 for v in values)
    if not numbers or len(values) != 3 or (name == "image_std" and min(values) < 1e-6):
        positive = "positive " if name == "image_std" else ""
        raise ImageError(f"expected three {positive}numbers for {name}, one per colour, got {values!r}")
    return tuple(float(value) for value in values)


def normalisation_tables(
    mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[np.ndarray, "3 256"]:
    """The normalised value of each 8-bit value of each colour.

    Equal to the reference's arithmetic bit for bit (transformers.image_transforms.rescale and normalize: a product
    in float64, the rest in float32).
    """
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    means, stds = (np.asarray(v, dtype=np.float32)[:, None] for v in (mean, std))
    return (levels - means) / stds


def normalised(
    pictures: UInt8[np.ndarray, "picture high wide 3"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float[np.ndarray, "picture 3 high wide"]:
    """Pictures with colours first, as the vision tower takes them."""
    tables = normalisation_tables(mean, std)
    return np.stack([table[pictures[..., colour]] for colour, table in enumerate(tables)], axis=1)


def area_bounds(config: Mapping[str, Any]) -> dict[str, int]:
    """`min_pixels` and `max_pixels` from the keys that versions of transformers have used for them."""
    size = config.get("size") or {}
    if not isinstance(size, Mapping) or set(size) - {
        "shortest_edge",
        "longest_edge",
        "min_pixels",
        "max_pixels",
    }:
        raise ImageError(
            "unsupported image processor: expected a `size` of shortest_edge and longest_edge (areas in "
            f"pixels), got {size!r}"
        )
    bounds = {}
    for bound, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        stated = {f"size.{name}": size[name] for name in (edge, bound) if size.get(name) is not None}
        if config.get(bound) is not None:
            stated = {bound: config[bound]}
        values = {whole(name, value) for name, value in stated.items()}
        if len(values) > 1:
            raise ImageError(f"the image processor's `size` contradicts itself: {stated}; make both agree")
        if values:
            bounds[bound] = values.pop()
    return bounds
