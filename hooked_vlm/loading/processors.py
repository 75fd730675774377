"""Image processors from the settings in a checkpoint folder, which `transformers` keeps in several files."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hooked_vlm.config import VisionConfig, VLMConfig
from hooked_vlm.converters import read_json
from hooked_vlm.converters.internvl import HF
from hooked_vlm.errors import CheckpointError, ImageError
from hooked_vlm.inputs.image_processor import CLIP_MEAN, CLIP_STD, ImageProcessor
from hooked_vlm.inputs.tiles import TileProcessor

PROCESSOR, IMAGES, VIDEOS = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
SETTINGS_FILES = (PROCESSOR, IMAGES, VIDEOS)

# Where a file is silent, the class of transformers decides: Qwen2VLImageProcessorPil, Qwen2VLVideoProcessor (if videos
# have settings of their own; else 4.x prepared them as images, with which the models were published),
# GotOcr2ImageProcessorPil
SILENT_IMAGES = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
SILENT_VIDEOS = {"min_pixels": 128 * 28 * 28, "max_pixels": 28 * 28 * 768}
SILENT_TILES = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}


@dataclass(frozen=True)
class Settings:
    """The settings of one processor, and the file that they come from."""

    values: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None
    """None: no file has any."""


def picture_settings(folder: Path) -> tuple[Settings, Settings]:
    """Settings of images and of videos, from where `transformers` reads them.

    Those in a section of `processor_config.json` (all that transformers 5 writes) come first, then those in a file of
    their own; settings of videos may also be those in the file for images
    (image_processing_base.py, `get_image_processor_dict`; video_processing_utils.py, `get_video_processor_dict`).

    Raises:
        CheckpointError: a file that cannot be read, or a section that is not an object.
    """
    nested = read_json(folder, PROCESSOR, default={})
    return _settings(folder, nested, "image_processor", (IMAGES,)), _settings(
        folder, nested, "video_processor", (VIDEOS, IMAGES)
    )


def _settings(folder: Path, nested: Mapping[str, Any], section: str, files: tuple[str, ...]) -> Settings:
    if (stated := nested.get(section)) is not None:
        if not isinstance(stated, Mapping):
            raise CheckpointError(f"{PROCESSOR}: {section} must be an object, got {stated!r}")
        return Settings(stated, PROCESSOR)
    for file in files:
        if (content := read_json(folder, file, default=None)) is not None:
            return Settings(content, file)
    return Settings()


def processor_of(
    cfg: VLMConfig, images: Settings | None = None, videos: Settings | None = None
) -> ImageProcessor | TileProcessor | None:
    """The checkpoint's image processor, with the vision tower's sizes where the settings are silent.

    Raises:
        CheckpointError: settings that are not supported, or that contradict config.json.
    """
    images, videos = images or Settings(), videos or Settings()
    vision = cfg.vision
    if vision is None:
        return None
    if vision.processor == "tiles":
        names = ("tile_size", "patch_size", "merge_size", "min_tiles", "max_tiles", "thumbnail", "transposed_tokens")
        sizes = {name: getattr(vision, name) for name in names}
        of_transformers = images.file is not None and cfg.original_architecture == HF
        try:
            return TileProcessor.from_dict(images.values, **sizes, **(SILENT_TILES if of_transformers else {}))
        except ImageError as error:
            raise _refusal(images, error) from error
    if vision.processor != "resized":
        raise CheckpointError(f'an image processor is "resized" or "tiles", got {vision.processor!r}')
    processor = _whole_images(images, SILENT_IMAGES, vision)
    if videos.file is None:
        return processor
    of_videos = _whole_images(videos, SILENT_IMAGES if videos.file == IMAGES else SILENT_VIDEOS, vision)
    return processor if of_videos == processor else replace(processor, for_videos=of_videos)


def _whole_images(settings: Settings, silent: Mapping[str, int], vision: VisionConfig) -> ImageProcessor:
    """A processor of images that are not tiled; without any file, with the published bounds."""
    sizes = {name: getattr(vision, name) for name in ("patch_size", "temporal_patch_size", "merge_size")}
    bounds = {} if settings.file is None else silent
    try:
        processor = ImageProcessor.from_dict(settings.values, **sizes, **bounds)
    except ImageError as error:
        raise _refusal(settings, error) from error
    for name, size in sizes.items():
        if getattr(processor, name) != size:
            raise CheckpointError(f"{settings.file} says {name} = {getattr(processor, name)}, config.json {size}")
    return processor


def _refusal(settings: Settings, error: ImageError) -> CheckpointError:
    where = "what config.json says of images" if settings.file is None else f"{settings.file} (or config.json)"
    return CheckpointError(f"{where}: {error}")
