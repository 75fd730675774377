"""`hooked-vlm demo`."""

from typing import Any

from hooked_vlm.experiments.demo.config import DemoConfig
from hooked_vlm.experiments.demo.pipeline import run
from hooked_vlm.experiments.demo.story import as_data, lines


def answer(config: DemoConfig) -> tuple[str, dict[str, Any]]:
    """Run the demo; the story in ten lines, and the same as data."""
    demo = run(config)
    return "\n".join(lines(demo)), as_data(demo)
