"""Where does it look? Values on image tokens as one HTML page that needs nothing beside it.

    viewer.attention(model, inputs, answer="7", boxes=[box]).save("page.html")
    viewer.vision_attention(model, inputs)
    viewer.values(inputs, coefficients, ("layer",)), viewer.lens(...), viewer.patching(...)

In a notebook a `View` shows itself.
"""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.viewer.attention_view import attention
    from hooked_vlm.viewer.values_view import lens, patching, values
    from hooked_vlm.viewer.view import Chip, View
    from hooked_vlm.viewer.vision_view import vision_attention

__all__ = ["Chip", "View", "attention", "lens", "patching", "values", "vision_attention"]
__getattr__, __dir__ = lazy_names(__name__)
