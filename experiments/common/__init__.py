"""What the studies share: figures, the report page, what a run records about itself."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.experiments.common.models import check_asks_about_images
    from hooked_vlm.experiments.common.report import Report
    from hooked_vlm.experiments.common.workers import WorkersConfig

__all__ = ["Report", "WorkersConfig", "check_asks_about_images"]
__getattr__, __dir__ = lazy_names(__name__)
