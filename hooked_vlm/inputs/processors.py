"""Image processors by the name that a configuration gives (`VisionConfig.processor`)."""

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import CheckpointError
from hooked_vlm.inputs.anyres import AnyresProcessor
from hooked_vlm.inputs.cropped import CropProcessor
from hooked_vlm.inputs.idefics3 import Idefics3Processor
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.image_settings import Settings
from hooked_vlm.inputs.onevision import OneVisionProcessor
from hooked_vlm.inputs.pan_and_scan import PanScanProcessor
from hooked_vlm.inputs.picture_processor import PictureProcessor
from hooked_vlm.inputs.stretched import StretchProcessor
from hooked_vlm.inputs.tiles import TileProcessor

PROCESSORS: dict[str, type[PictureProcessor]] = {
    "resized": ImageProcessor,
    "tiles": TileProcessor,
    "cropped": CropProcessor,
    "anyres": AnyresProcessor,
    "onevision": OneVisionProcessor,
    "idefics3": Idefics3Processor,
    "stretched": StretchProcessor,
    "pan_and_scan": PanScanProcessor,
}


def processor_of(
    cfg: VLMConfig, images: Settings | None = None, videos: Settings | None = None
) -> PictureProcessor | None:
    """The checkpoint's image processor, with the vision tower's sizes where the settings are silent.

    Raises:
        CheckpointError: settings that are not supported, or that contradict config.json.
    """
    if cfg.vision is None:
        return None
    if cfg.vision.processor not in PROCESSORS:
        raise CheckpointError(
            f"the configuration names the image processor {cfg.vision.processor!r}; known are {', '.join(PROCESSORS)}"
        )
    return PROCESSORS[cfg.vision.processor].from_checkpoint(cfg, images or Settings(), videos or Settings())
