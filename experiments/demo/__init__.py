"""Demo: two heads read a page; turn them down, and the model can no longer read.

`run(DemoConfig())` measures everything and writes one HTML page; `hooked-vlm demo` is the same from the command line.
"""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.experiments.demo.config import DemoConfig
    from hooked_vlm.experiments.demo.pipeline import Demo, run

__all__ = ["Demo", "DemoConfig", "run"]
__getattr__, __dir__ = lazy_names(__name__)
