"""The settings of pictures in a checkpoint folder, which `transformers` keeps in several files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hooked_vlm.converters import read_json
from hooked_vlm.errors import CheckpointError
from hooked_vlm.inputs.image_settings import IMAGES, PROCESSOR, VIDEOS, Settings

SETTINGS_FILES = (PROCESSOR, IMAGES, VIDEOS)


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
