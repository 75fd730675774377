"""Replies of a model, and the argmax of its heads' attention while it generates them.

A model that knows the answer generates it and stops. So the expected answer is appended to the prompt first: where
greedy decoding predicts exactly this answer, the one pass replaces generation and gives the attention rows. Only the
other examples are generated token by token. No tensor of size tokens x tokens is made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vlm.analysis.head_outputs import on_head_outputs, output_norms
from hooked_vlm.analysis.rows import attention_rows
from hooked_vlm.experiments.ocr_heads.examples import Example, to_inputs
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True, eq=False)
class Copy:
    """A token that a head may have copied."""

    position: int | None
    """Position of the attention row; None if the token was not generated."""
    weight: float
    """Weight of a hit."""
    evidence: tuple[int, ...]
    """Positions of the tokens it may be copied from."""
    token: bool = True
    """Whether it is a token of the answer (an instance of a score by token)."""
    origin: int = 0
    """Where the page with the evidence begins."""


Ask = Callable[[VLMInputs, int, Example, list[int]], list[Copy]]
"""(prompts and replies, row, example, reply) -> tokens to score. The reply begins at `stop[row] - len(reply)`."""


NOWHERE = -1


@dataclass(frozen=True, eq=False)
class Reading:
    """Reply to one example, and the heads' hits."""

    reply: list[int]
    copies: list[Copy]
    looked: Int[np.ndarray, "copy layer head"]
    """Position of the argmax of a head's attention; NOWHERE for tokens that were not generated."""
    norms: Float[np.ndarray, "layer head"]
    """Mean norm of a head's output in the residual stream, over the prompt's positions without padding."""

    @property
    def hits(self) -> Bool[np.ndarray, "copy layer head"]:
        """Whether the argmax of a head's attention is on the evidence."""
        found = [np.isin(own, copy.evidence) for own, copy in zip(self.looked, self.copies, strict=True)]
        return np.array(found, dtype=bool).reshape(self.looked.shape)


def read(
    model: HookedVLM,
    examples: Sequence[Example],
    ask: Ask,
    pixels: int | None,
    new_tokens: int,
    keys: Literal["all", "prompt"] = "all",
    stop_ids: Sequence[int] = (),
) -> list[Reading]:
    """Answer a batch of examples and score the tokens that `ask` selects.

    Args:
        keys: keys of the argmax: all, or the prompt without its last token.
        stop_ids: tokens that end a reply beside the checkpoint's own.
    """
    stops = [*model.cfg.eos_token_ids, *stop_ids]
    inputs = to_inputs(model, examples, pixels)
    if inputs.has_visuals:
        inputs = inputs.with_image_features(model.encode_images(inputs).detach())
    readings = _expected(model, inputs, examples, ask, new_tokens, keys, stops)
    others = [row for row, reading in enumerate(readings) if reading is None]
    if others:
        chosen, own = inputs[others], [examples[row] for row in others]
        generated = model.generate(chosen, new_tokens, eos_token_id=stops or None)[:, chosen.shape[1] :]
        replies = [until_stop(row.tolist(), stops) for row in generated]
        for row, (reading, _) in zip(others, _look(model, chosen, own, replies, ask, keys), strict=True):
            readings[row] = reading
    return [reading for reading in readings if reading is not None]


def _expected(
    model: HookedVLM,
    inputs: VLMInputs,
    examples: Sequence[Example],
    ask: Ask,
    new_tokens: int,
    keys: str,
    stops: Sequence[int],
) -> list[Reading | None]:
    """Readings of the examples whose greedy reply is exactly the expected answer; None for the others."""
    answers = [model.tokenizer(e.answer, add_special_tokens=False)["input_ids"] for e in examples]
    longest = max(map(len, answers))
    if not stops or longest >= new_tokens or inputs.shape[1] + longest + 1 > model.cfg.n_ctx_limit:
        return [None] * len(examples)
    found = _look(model, inputs, examples, [[*answer, stops[0]] for answer in answers], ask, keys)
    readings: list[Reading | None] = []
    for answer, (reading, predicted) in zip(answers, found, strict=True):
        as_expected = predicted[:-1] == answer and predicted[-1] in stops and not set(answer) & set(stops)
        readings.append(Reading(answer, reading.copies, reading.looked, reading.norms) if as_expected else None)
    return readings


def _look(
    model: HookedVLM, inputs: VLMInputs, examples: Sequence[Example], replies: list[list[int]], ask: Ask, keys: str
) -> list[tuple[Reading, list[int]]]:
    """Run one pass over prompts and replies: each example's reading, and the greedy prediction of its reply."""
    continued = inputs.append([torch.tensor(reply, dtype=torch.long) for reply in replies])
    copies = [ask(continued, row, example, replies[row]) for row, example in enumerate(examples)]
    looked, norms, predicted = _argmax(model, continued, inputs.shape[1], copies, [len(r) for r in replies], keys)
    readings = [Reading(*own) for own in zip(replies, copies, looked, norms, strict=True)]
    return list(zip(readings, predicted, strict=True))


def until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Generated ids up to the first stop token."""
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]


def _argmax(
    model: HookedVLM,
    inputs: VLMInputs,
    n_prompt: int,
    copies: list[list[Copy]],
    n_reply: list[int],
    keys: str,
) -> tuple[list[Int[np.ndarray, "copy layer head"]], Float[np.ndarray, "row layer head"], list[list[int]]]:
    """Argmax of every head at every copy, output norms on the prompts, greedy predictions."""
    queries = [[copy.position for copy in own if copy.position is not None] for own in copies]
    width = max(1, *map(len, queries))
    # the last position fills unused columns
    positions = torch.tensor(
        [own + [stop - 1] * (width - len(own)) for own, stop in zip(queries, inputs.stop, strict=True)]
    )
    last_key = n_prompt - 1 if keys == "prompt" else inputs.shape[1]
    norms: dict[int, Tensor] = {}
    predicted: list[list[int]] = []
    prompt = inputs.attention_mask.clone()
    prompt[:, n_prompt:] = 0

    def measure_norm(layer: int, z: Tensor, post_scale: Tensor | None) -> None:
        norms[layer] = output_norms(z, model.blocks[layer], prompt, post_scale)

    def predict(normalized: Tensor, hook: Any) -> None:
        for row, (stop, n) in enumerate(zip(inputs.stop, n_reply, strict=True)):
            predicted.append(model.unembed(normalized[row, stop - n - 1 : stop - 1]).argmax(-1).tolist())

    argmax = attention_rows(
        model,
        inputs,
        positions,
        reduce=lambda rows: rows[..., :last_key].argmax(-1),
        fwd_hooks=[*on_head_outputs(model, measure_norm), ("ln_final.hook_out", predict)],
    ).cpu()
    looked = []
    for row, own in enumerate(copies):
        found = np.full((len(own), model.cfg.n_layers, model.cfg.n_heads), NOWHERE)
        generated = [i for i, copy in enumerate(own) if copy.position is not None]
        for column, i in enumerate(generated):
            found[i] = argmax[:, row, :, column].numpy()
        looked.append(found)
    stacked = torch.stack([norms[layer] for layer in range(model.cfg.n_layers)], dim=1)
    return looked, stacked.float().cpu().numpy(), predicted
