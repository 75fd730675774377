"""Toy pages and drawings: pictures with text whose content and boxes are known, for examples and tests."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.toys.drawings import OBJECTS, draw_object
    from hooked_vlm.toys.pages import NAMING_PROMPT, Page, Sample, make_page, naming_sample, random_lines

__all__ = ["NAMING_PROMPT", "OBJECTS", "Page", "Sample", "draw_object", "make_page", "naming_sample", "random_lines"]
__getattr__, __dir__ = lazy_names(__name__)
