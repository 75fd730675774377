"""Where the answer of a stimulus is: image tokens of its boxes, or tokens of the same characters in the prompt."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_vlm.atlas.stimuli import Stimulus
from hooked_vlm.data.samples import NamedBox
from hooked_vlm.errors import NotSeenError
from hooked_vlm.inputs.boxes import Box
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.text import token_spans
from hooked_vlm.inputs.vlm_inputs import VLMInputs

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

LEAST = 0.1
"""A token is one of a box if it holds more than this share of the box (arXiv 2505.15865), or lies in it for more than
`MOSTLY` of its own area."""
MOSTLY = 0.5
Keys = Bool[Tensor, "part key"]


def tokens_of_boxes(
    model: "HookedVLM", batch: VLMInputs, row: int, stimulus: Stimulus, source: Stimulus
) -> Bool[Tensor, "part key"]:
    """Image tokens that each token of the answer to `stimulus` may be read from, by the boxes of `source`.

    On a page a token has the boxes of its characters (another page's: those in the same places of its answer, from the
    start again where that is shorter); otherwise all boxes hold the whole answer.
    """
    answer = _answer(batch, row)
    found = torch.zeros(len(answer), batch.shape[1], dtype=torch.bool)
    boxes = source.boxes("evidence")
    if not boxes:
        return found
    images = [visual for visual in batch.visuals if visual.row == row]
    by_box = []
    for own in boxes:
        visual = images[own.image % len(images)]
        placed = scaled(own, source, visual.layout, own.image)
        by_box.append(visual.positions[tokens_in(visual.layout, placed)])
    _, spans = token_spans(model.tokenizer, answer)
    for part, (start, stop) in enumerate(spans):
        own = range(len(boxes)) if stimulus.kind != "page" else {i % len(boxes) for i in range(start, stop)}
        for i in own:
            found[part, by_box[i]] = True
    return found


def scaled(box: NamedBox, source: Stimulus, layout: ImageLayout, image: int) -> tuple[float, float, float, float]:
    """A box at the same place of a picture of another size."""
    picture = source.asked.images[image]
    width, height = getattr(picture, "size", layout.image_size)
    x, y = layout.image_size.width / width, layout.image_size.height / height
    x0, y0, x1, y1 = box.box
    return float(x0 * x), float(y0 * y), float(x1 * x), float(y1 * y)


def tokens_in(layout: ImageLayout, box: Box) -> list[int]:
    """Tokens of a layout (or patches, of `layout.patches`) that are those of a box; none where the model does not see
    the picture there."""
    try:
        hold = set(layout.tokens_in_box(box, LEAST)) | set(layout.tokens_in_box(box, MOSTLY, of="token"))
    except NotSeenError:
        return []
    return sorted(hold)


def needle(model: "HookedVLM", batch: VLMInputs, row: int) -> Bool[Tensor, "part key"]:
    """Tokens of the prompt that hold the characters of each token of the answer, wherever the answer stands in it."""
    answer, first = _answer(batch, row), batch.first[row]
    prompt = batch.tokens[row, first : batch.stop[row] - len(answer)].tolist()
    text, spans = token_spans(model.tokenizer, prompt)
    wanted, parts = token_spans(model.tokenizer, answer)
    lead = len(wanted) - len(wanted.lstrip())
    found = torch.zeros(len(answer), batch.shape[1], dtype=torch.bool)
    at = text.find(wanted.strip())
    while at >= 0 and wanted.strip():
        for part, (start, stop) in enumerate(parts):
            begin, end = at + max(start - lead, 0), at + stop - lead
            for key, (a, b) in enumerate(spans):
                if a < end and begin < b:
                    found[part, first + key] = True
        at = text.find(wanted.strip(), at + 1)
    return found


def _answer(batch: VLMInputs, row: int) -> list[int]:
    stop = batch.stop[row]
    return batch.tokens[row, stop - batch.n_generated[row] : stop].tolist()
