"""New inputs from old ones: an answer appended, another picture in an image's place."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.batching import left_pad
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.images import load_image
from hooked_vlm.inputs.picture_settings import PictureSettings, process_images
from hooked_vlm.inputs.token_layout import InputSpec, Visual

if TYPE_CHECKING:
    from hooked_vlm.inputs.vlm_inputs import VLMInputs

Answer = str | Sequence[str] | Int[Tensor, "..."] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]
"""Text or token ids: one for all rows, or one for each."""


def append_answer(inputs: "VLMInputs", answer: Answer) -> "VLMInputs":
    """Continue the rows by `answer`; see `VLMInputs.append`."""
    answers = _answers(inputs, answer)
    prompts = [inputs.tokens[r, a:b] for r, (a, b) in enumerate(zip(inputs.first, inputs.stop, strict=True))]
    rows = [torch.cat((prompt, new)) for prompt, new in zip(prompts, answers, strict=True)]
    width = max(a + len(row) for a, row in zip(inputs.first, rows, strict=True))
    tokens = inputs.tokens.new_full((len(inputs), width), inputs.spec.pad_token_id)
    mask = torch.zeros_like(tokens)
    for r, (a, row) in enumerate(zip(inputs.first, rows, strict=True)):
        tokens[r, a : a + len(row)] = row
        mask[r, a : a + len(row)] = 1
    generated = tuple(n + len(new) for n, new in zip(inputs.n_generated, answers, strict=True))
    return replace(inputs, tokens=tokens, attention_mask=mask, n_generated=generated)


def _answers(inputs: "VLMInputs", answer: Any) -> list[Tensor]:
    """The token ids to append to each row."""
    if isinstance(answer, str):
        answer = [answer] * len(inputs)
    elif not isinstance(answer, Tensor) and len(answer) and isinstance(answer[0], int):
        answer = torch.tensor(answer)
    if isinstance(answer, Tensor) and answer.ndim == 1:
        answer = answer.expand(len(inputs), -1)
    rows = []
    for one in answer:
        if isinstance(one, str):
            if inputs.spec.tokenizer is None:
                raise InputError("these inputs have no tokenizer: append token ids, not text")
            one = inputs.spec.tokenizer.encode(one, add_special_tokens=False)
        if torch.as_tensor(one).is_floating_point() and len(one):
            raise InputError("an appended answer is text or token ids, which are whole numbers")
        rows.append(torch.as_tensor(one, dtype=inputs.tokens.dtype, device=inputs.device).reshape(-1))
    if len(rows) != len(inputs):
        raise InputError(f"got {len(rows)} answers for {len(inputs)} rows: give one for all, or one per row")
    if any(int(t) in inputs.spec.placeholder_ids for row in rows for t in row):
        raise InputError("an appended answer cannot hold image placeholders")
    return rows


def replace_image(inputs: "VLMInputs", i: int, image: Any) -> "VLMInputs":
    """The same prompt with another picture as image `i`; see `VLMInputs.with_image`."""
    spec = inputs.spec
    if spec.image_processor is None:
        raise InputError("these inputs have no image processor: make them with model.to_inputs(...)")
    visual = inputs.visual("image", i)
    settings = PictureSettings() if inputs.image_settings is None else inputs.image_settings[i]
    n_images = sum(v.kind == "image" and v.row == visual.row for v in inputs.visuals)
    pixels, grid_thw, (layout,) = process_images([load_image(image)], [settings], spec.image_processor.among(n_images))
    assert inputs.image_grid_thw is not None and inputs.pixel_values is not None
    grids = inputs.image_grid_thw.clone()
    pieces = list(inputs.pixel_values.split([spec.n_pixel_rows(tuple(grid)) for grid in grids.tolist()]))
    grids[i] = grid_thw[0].to(grids)
    pieces[i] = pixels.to(inputs.pixel_values)
    rows, masks = list(inputs.tokens), list(inputs.attention_mask)
    row, mask = rows[visual.row], masks[visual.row]
    placeholders = _placeholders(spec, row, visual, layout)
    rows[visual.row] = torch.cat((row[: visual.start], placeholders, row[visual.stop :]))
    masks[visual.row] = torch.cat((mask[: visual.start], mask.new_ones(len(placeholders)), mask[visual.stop :]))
    tokens, attention_mask = left_pad(rows, masks, spec.pad_token_id)
    layouts = inputs.image_layouts or ()
    return replace(
        inputs,
        tokens=tokens,
        attention_mask=attention_mask,
        pixel_values=torch.cat(pieces),
        image_grid_thw=grids,
        image_layouts=(*layouts[:i], layout, *layouts[i + 1 :]),
        image_features=None,
    )


def _placeholders(spec: InputSpec, row: Tensor, visual: Visual, layout: ImageLayout) -> Int[Tensor, "pos"]:
    """The tokens of another picture from the first of its placeholders to the last.

    Raises:
        InputError: it has other runs of placeholders, between which stands text.
    """
    if len(layout.runs) == 1 == len(visual.runs):
        return row.new_full((layout.n_tokens,), int(row[visual.start]))
    if (layout.runs, layout.between) == (visual.layout.runs, visual.layout.between):
        return row[visual.start : visual.stop]
    raise InputError(
        f"image {visual.index} has {len(visual.runs)} runs of tokens with text between them, the new picture others "
        f"({', '.join(map(str, layout.runs))}): give one of the same shape, or make new inputs"
    )
