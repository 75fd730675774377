"""Where does it look? Values on image tokens as one HTML page that needs nothing beside it.

    viewer.attention(model, inputs, answer="7", boxes=[box]).save("page.html")
    viewer.vision_attention(model, inputs)
    viewer.values(inputs, coefficients, ("layer",)), viewer.lens(...), viewer.patching(...)

In a notebook a `View` shows itself.
"""

from hooked_vlm.viewer.attention_view import attention as attention
from hooked_vlm.viewer.values_view import lens as lens
from hooked_vlm.viewer.values_view import patching as patching
from hooked_vlm.viewer.values_view import values as values
from hooked_vlm.viewer.view import View as View
from hooked_vlm.viewer.vision_view import vision_attention as vision_attention
