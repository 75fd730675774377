"""Head attribution (arXiv 2509.17588): which attention heads carry information from the image to the text.

`run(All(...))` asks for the name of the object in each picture, ablates random sets of heads, regresses the answer's
logit on the sets, checks the ranking by faithfulness and completeness, and measures the flow from image tokens to text
tokens. `hooked-vlm head-attribution all` does the same from the command line.
"""

from hooked_vlm.experiments.head_attribution.compare import compare as compare
from hooked_vlm.experiments.head_attribution.config import All as All
from hooked_vlm.experiments.head_attribution.config import Attribute as Attribute
from hooked_vlm.experiments.head_attribution.config import Compare as Compare
from hooked_vlm.experiments.head_attribution.config import Curves as Curves
from hooked_vlm.experiments.head_attribution.config import Tokens as Tokens
from hooked_vlm.experiments.head_attribution.config import Where as Where
from hooked_vlm.experiments.head_attribution.study import HeadAttributionResult as HeadAttributionResult
from hooked_vlm.experiments.head_attribution.study import run as run
