"""The attention of chosen tokens to the images, as a page."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.rows import attention_rows
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import Answer, VLMInputs
from hooked_vlm.nn.hooks import HookName
from hooked_vlm.viewer.facts import facts_of
from hooked_vlm.viewer.scene import Boxes, image_columns, one_row, scene_of
from hooked_vlm.viewer.view import Chip, Head, View, view_of

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

Query = Literal["producing", "token"]
"""The query whose attention a token shows: the position before it, which predicted it, or its own."""
NOTES = {
    "producing": "A token shows the attention of the position before it, from which it was predicted: to the image and "
    "to the text.",
    "token": "A token shows its own attention, that of its position: to the image and to the text.",
}
SMALL = 4_000_000
"""Number of values up to which the tokens of the prompt can be chosen in a page, too."""


def attention(
    model: "HookedVLM",
    inputs: VLMInputs,
    answer: Answer | None = None,
    heads: Sequence[Head] | None = None,
    boxes: Boxes | None = None,
    *,
    images: Any = None,
    tokens: Sequence[int] | None = None,
    query: Query = "producing",
    max_new_tokens: int = 32,
    fwd_hooks: Sequence[tuple[HookName, Callable]] = (),
    title: str = "Where the model looks",
) -> View:
    """The attention of each token to the images and to the text, in every head, as a page.

    One forward pass over prompt and answer (`attention_rows`: linear cost); without an answer, one is generated first.
    Values are softmax probabilities over all tokens: a map shows those of the image tokens, and the text beside it
    those of the text tokens.

    Args:
        inputs: one prompt with images.
        answer: text or token ids; by default what was appended to the inputs, or the greedy answer.
        heads: (layer, head) pairs to step through, best first.
        boxes: where the evidence is, in pixels of the original image; see `scene.Boxes`.
        images: the original pictures. Without them the page shows the pixels that the model saw.
        tokens: positions in prompt and answer whose attention is wanted; by default the answer's, and those of the
            prompt's text as long as the page stays small (`SMALL` values).
        query: "producing", as in generation (and in the OCR-heads paper), or "token".
        fwd_hooks: hooks for the pass, and for the generation before it: the attention of an edited model, such as
            `ZeroHeads(((2, 1),)).hooks(model, inputs)`. Not on scores or patterns: the rows are made beside those.

    Raises:
        InputError: a batch of several rows, no image, an empty answer, positions or heads that do not exist, or hooks
            on scores or patterns.
    """
    _check_hooks(model, fwd_hooks)
    inputs = _with_answer(model, one_row(model.as_inputs(inputs)), answer, max_new_tokens, fwd_hooks)
    scene = scene_of(inputs, images, () if boxes is None else boxes)
    on_text = text_columns(inputs)
    n_values = model.cfg.n_layers * model.cfg.n_heads * (scene.n_tokens + len(on_text))
    shown = _shown(inputs, tokens, query, SMALL // n_values)
    rows = torch.tensor([[pos - 1 if query == "producing" else pos for pos in shown]])
    columns = torch.tensor([*image_columns(inputs), *on_text])

    def on_tokens(pattern: Float[Tensor, "batch head row key"]) -> Float[Tensor, "row head column"]:
        values = pattern[0].index_select(-1, columns.to(pattern.device))
        elsewhere = (pattern[0].sum(-1) - values[..., : scene.n_tokens].sum(-1)).clamp(min=0)
        return torch.cat((values, elsewhere[..., None]), -1).transpose(0, 1).cpu()

    found = attention_rows(model, inputs, rows, reduce=on_tokens, fwd_hooks=fwd_hooks)
    found = found.transpose(0, 1).float().numpy()
    elsewhere = found[..., -1]
    n_first = inputs.n_generated[0] if tokens is None else len(shown)  # the page starts where these look at the image
    return view_of(
        scene,
        found[..., : scene.n_tokens],
        _chips(model, inputs, shown, on_text),
        range(model.cfg.n_layers),
        range(model.cfg.n_heads),
        elsewhere,
        heads or (),
        found[..., scene.n_tokens : -1],
        title=title,
        facts=facts_of(inputs, model),
        note=NOTES[query],
        quantity="attention",
        layer=int(elsewhere[:n_first].mean((0, 2)).argmin()),
    )


def _check_hooks(model: "HookedVLM", fwd_hooks: Sequence[tuple[HookName, Callable]]) -> None:
    ends = ("attn.hook_attn_scores", "attn.hook_pattern")
    beside = [name for name in model.hook_dict if name.startswith("blocks.") and name.endswith(ends)]
    for wanted, _ in fwd_hooks:
        for name in beside:
            if wanted == name if isinstance(wanted, str) else wanted(name):
                raise InputError(f"a page does not see what hooks do at {name}: edit what comes before it")


def _with_answer(
    model: "HookedVLM",
    inputs: VLMInputs,
    answer: Answer | None,
    max_new_tokens: int,
    fwd_hooks: Sequence[tuple[HookName, Callable]],
) -> VLMInputs:
    if answer is not None:
        return inputs.append(answer)
    if inputs.n_generated[0]:
        return inputs
    return inputs.append(model.generate(inputs, max_new_tokens, fwd_hooks=fwd_hooks)[:, inputs.shape[1] :])


def text_columns(inputs: VLMInputs) -> list[int]:
    """Positions of the tokens of one prompt and answer that belong to no image: line breaks within an image do."""
    within = {pos for visual in inputs.visuals for pos in range(visual.start, visual.stop)}
    return [pos for pos in range(inputs.first[0], inputs.stop[0]) if pos not in within]


def _shown(inputs: VLMInputs, tokens: Sequence[int] | None, query: Query, most: int) -> list[int]:
    """Positions of the tokens whose attention is shown: the answer's first, and the prompt's if there are at most
    `most` in all."""
    if query not in NOTES:
        raise InputError(f'query must be "producing" or "token", got {query!r}')
    first, stop = inputs.first[0] + (query == "producing"), inputs.stop[0]
    if tokens is None:
        if not inputs.n_generated[0]:
            raise InputError("the answer is empty: pass answer=..., or the positions whose attention you want")
        answer = inputs.positions.generated[0].tolist()
        prompt = [pos for pos in text_columns(inputs) if first <= pos < answer[0]]
        return answer + prompt if len(answer) + len(prompt) <= most else answer
    for pos in tokens:
        if not first <= pos < stop:
            raise InputError(f"there is no token {pos} to ask for: positions go from {first} to {stop - 1}")
    if not len(tokens):
        raise InputError("there are no tokens to ask for: tokens is empty")
    return sorted({int(pos) for pos in tokens})


def _chips(model: "HookedVLM", inputs: VLMInputs, shown: Sequence[int], on_text: Sequence[int]) -> list[Chip]:
    """The text token by token, each image as one piece (and its selected tokens)."""
    ids = inputs.tokens[0].tolist()
    prompt_stop = inputs.stop[0] - inputs.n_generated[0]
    rows = {pos: row for row, pos in enumerate(shown)}
    columns = {pos: column for column, pos in enumerate(on_text)}
    images = {visual.start: visual for visual in inputs.visuals}
    chips, within = [], None
    for pos in range(inputs.first[0], inputs.stop[0]):
        if pos in images:
            within = images[pos]
            chips.append(Chip(f"image {within.index}: {within.n_tokens} tokens", "image"))
        text = str(ids[pos]) if model.tokenizer is None else str(model.to_string([ids[pos]]))
        if within is not None and pos < within.stop:
            if pos in rows:
                chips.append(Chip(f"image token {pos}" if within.holds(pos) else text, "image", rows[pos]))
            continue
        chips.append(Chip(text, "prompt" if pos < prompt_stop else "answer", rows.get(pos), columns[pos]))
    return chips
