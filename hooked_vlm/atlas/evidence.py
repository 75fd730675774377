"""Where the answer of a stimulus is: image tokens of its boxes, or tokens of the same characters in the prompt."""

import re
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_vlm.atlas.stimuli import Stimulus
from hooked_vlm.data.samples import NamedBox
from hooked_vlm.errors import GeometryError, InputError, NotSeenError
from hooked_vlm.inputs.boxes import Box
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.images import load_image
from hooked_vlm.inputs.text import token_spans
from hooked_vlm.inputs.vlm_inputs import VLMInputs

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

LEAST = 0.1
"""A token is one of a box if it holds more than this share of the box (arXiv 2505.15865), or lies in it for more than
`MOSTLY` of its own area."""
MOSTLY = 0.5


def tokens_of_boxes(
    model: "HookedVLM", batch: VLMInputs, row: int, stimulus: Stimulus, source: Stimulus
) -> Bool[Tensor, "part key"]:
    """Image tokens that each token of the answer to `stimulus` may be read from, by the boxes of `source`.

    On a page a token has the boxes of its characters (another page's: those in the same places of its answer, from the
    start again where that is shorter); otherwise all boxes hold the whole answer. None where the tokenizer's text of
    the answer has other characters than the page has boxes.

    Raises:
        InputError: a box that no part of the picture lies in.
    """
    answer = _answer(batch, row)
    found = torch.zeros(len(answer), batch.shape[1], dtype=torch.bool)
    page = stimulus.kind == "page"
    boxes = [box for box in source.boxes("evidence") if box.name.strip() or not page]
    if not boxes:
        return found
    images = [visual for visual in batch.visuals if visual.row == row]
    by_box = []
    for own in boxes:
        visual = images[own.image % len(images)]
        placed = own.box if source is stimulus else _scaled(own, source, visual.layout)
        by_box.append(visual.positions[tokens_of_box(visual.layout, placed, source.name)])
    text, spans = token_spans(model.tokenizer, answer)
    characters = [i for i, character in enumerate(text) if not character.isspace()]
    if page and source is stimulus and len(characters) != len(boxes):
        return found
    for part, (start, stop) in enumerate(spans):
        for number in [n for n, i in enumerate(characters) if start <= i < stop] if page else range(len(boxes)):
            found[part, by_box[number % len(boxes)]] = True
    return found


def _scaled(box: NamedBox, source: Stimulus, layout: ImageLayout) -> Box:
    """A box at the same place of a picture of another size."""
    own, size = load_image(source.asked.pictures[box.image]).size, layout.image_size
    return tuple(corner * size[i % 2] / own[i % 2] for i, corner in enumerate(box.box))


def tokens_of_box(layout: ImageLayout, box: Box, name: str) -> list[int]:
    """Tokens of a layout (or patches, of `layout.patches`) that are those of a box; none where the model does not see
    the picture there.

    Args:
        name: of the sample, for errors.

    Raises:
        InputError: a box without area, or that no part of the picture lies in.
    """
    try:
        hold = set(layout.tokens_in_box(box, LEAST)) | set(layout.tokens_in_box(box, MOSTLY, of="token"))
    except NotSeenError:
        return []
    except GeometryError as error:
        raise InputError(f"sample {name!r}: {error}") from error
    return sorted(hold)


def needle(model: "HookedVLM", batch: VLMInputs, row: int) -> Bool[Tensor, "part key"]:
    """Tokens of the prompt that hold the characters of each token of the answer, wherever the answer stands in it: as
    whole words, or anywhere if it never does."""
    answer, first = _answer(batch, row), batch.first[row]
    prompt = batch.tokens[row, first : batch.stop[row] - len(answer)].tolist()
    text, spans = token_spans(model.tokenizer, prompt)
    wanted, parts = token_spans(model.tokenizer, answer)
    lead = len(wanted) - len(wanted.lstrip())
    found = torch.zeros(len(answer), batch.shape[1], dtype=torch.bool)
    for at in _places(wanted.strip(), text):
        for part, (start, stop) in enumerate(parts):
            begin, end = at + max(start - lead, 0), at + stop - lead
            for key, (a, b) in enumerate(spans):
                if a < end and begin < b:
                    found[part, first + key] = True
    return found


def _places(wanted: str, text: str) -> list[int]:
    """Where a text begins in another, overlaps too: places where it is no part of a longer word, if there are any."""
    escaped = re.escape(wanted)
    for pattern in (rf"(?<!\w){escaped}(?!\w)", escaped):
        if wanted and (found := [own.start() for own in re.finditer(f"(?={pattern})", text)]):
            return found
    return []


def _answer(batch: VLMInputs, row: int) -> list[int]:
    stop = batch.stop[row]
    return batch.tokens[row, stop - batch.n_generated[row] : stop].tolist()
