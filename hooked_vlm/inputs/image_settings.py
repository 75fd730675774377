"""Settings that the image processors of all families share, from `preprocessor_config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from hooked_vlm.errors import CheckpointError, ImageError

PROCESSOR, IMAGES, VIDEOS = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"


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


def common_settings(config: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """`image_mean` and `image_std`, where stated.

    Raises:
        ImageError: a step is switched off, or set to something not supported.
    """
    for key, expected in (
        ("do_resize", True),
        ("do_rescale", True),
        ("do_normalize", True),
        ("resample", Image.Resampling.BICUBIC.value),
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
