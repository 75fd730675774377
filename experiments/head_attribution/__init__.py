"""Head attribution (arXiv 2509.17588): which attention heads carry information from the image to the text.

`run(All(...))` asks for the name of the object in each picture, ablates random sets of heads, regresses the answer's
logit on the sets, checks the ranking by faithfulness and completeness, and measures the flow from image tokens to text
tokens. `hooked-vlm head-attribution all` does the same from the command line.
"""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.experiments.head_attribution.comparison import compare
    from hooked_vlm.experiments.head_attribution.config import (
        All,
        Attribute,
        Compare,
        Curves,
        HeadAttributionConfig,
        Tokens,
        Where,
    )
    from hooked_vlm.experiments.head_attribution.pages import heads_page, tokens_page
    from hooked_vlm.experiments.head_attribution.study import HeadAttributionResult, run

__all__ = [
    "All", "Attribute", "Compare", "Curves", "HeadAttributionConfig", "HeadAttributionResult", "Tokens", "Where",
    "compare", "heads_page", "run", "tokens_page",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
