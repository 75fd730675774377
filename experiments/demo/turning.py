"""What a model answers as heads are turned down, character by character, and where watched heads look meanwhile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.rows import attention_rows
from hooked_vlm.experiments.ocr_heads.reading import until_stop
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions import Head
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.viewer.scene import image_columns

FACTORS = tuple(step / 10 for step in range(11))
"""What the heads' outputs are multiplied by, from off to unchanged."""


@dataclass(frozen=True, eq=False)
class Reply:
    """A greedy reply."""

    tokens: tuple[str, ...]
    probabilities: Float[np.ndarray, "token"]
    """The model's probability of each token where it was generated."""
    attention: Float[np.ndarray, "watched token image_token"]
    """Attention of the watched heads on the image tokens, from the position that predicts each token."""
    text: str


@dataclass(frozen=True, eq=False)
class TurnedDown:
    """Heads turned down in steps."""

    heads: tuple[Head, ...]
    replies: tuple[Reply, ...]
    """One for each of `FACTORS`."""
    expected: Float[np.ndarray, "factor"]
    """Probability that the model, sampling, gives exactly the expected answer and stops."""


def scaled_by_row(heads: Sequence[Head], factors: Float[Tensor, "row"]) -> list[tuple[str, Callable]]:
    """Hooks that multiply the outputs of heads by the factor of each row of a batch: one `ScaleHeads` for each row."""

    def scaling(head: int) -> Callable[[Tensor, Any], Tensor]:
        def scale(z: Float[Tensor, "row pos head d_head"], hook: Any) -> Tensor:
            z[:, :, head] *= factors.to(z)[:, None, None]
            return z

        return scale

    return [(f"blocks.{layer}.attn.hook_z", scaling(head)) for layer, head in heads]


@torch.no_grad()
def turn_down(
    model: HookedVLM, inputs: VLMInputs, answer: str, heads: tuple[Head, ...], watched: Sequence[Head], new_tokens: int
) -> TurnedDown:
    """Answer one prompt with heads scaled by each of `FACTORS`, all in one batch.

    Args:
        answer: the expected answer.
        watched: heads whose attention is kept.
    """
    hooks = scaled_by_row(heads, torch.tensor(FACTORS))
    batch = inputs[[0] * len(FACTORS)]
    stops = model.cfg.eos_token_ids
    generated, logits = model.generate(batch, new_tokens, fwd_hooks=hooks, output_logits=True)
    ids = [until_stop(row[inputs.shape[1] :].tolist(), stops) for row in generated]
    attention = attention_on_image(model, batch, ids, watched, hooks)
    replies = []
    for row, own in enumerate(ids):
        chosen = (
            logits[row, : len(own)].float().softmax(-1).gather(-1, torch.tensor(own, device=logits.device)[:, None])
        )
        tokens = tuple(str(model.to_string([token])) for token in own)
        replies.append(Reply(tokens, chosen[:, 0].cpu().numpy(), attention[row], str(model.to_string(own)).strip()))
    return TurnedDown(heads, tuple(replies), answer_probability(model, batch, answer, hooks))


def attention_on_image(
    model: HookedVLM, batch: VLMInputs, replies: Sequence[Sequence[int]], watched: Sequence[Head], hooks: Any
) -> list[Float[np.ndarray, "watched token image_token"]]:
    """Attention of the watched heads on the image while each token of each row's reply is predicted."""
    whole = batch.append([torch.tensor(reply, dtype=torch.long) for reply in replies])
    width = max(1, *map(len, replies))
    last = batch.shape[1] - 1
    # a shorter reply repeats its last query, which is left out below
    queries = torch.tensor([[last + min(i, len(reply)) for i in range(width)] for reply in replies])
    layers = sorted({layer for layer, _ in watched})
    rows = attention_rows(model, whole, queries, layers, fwd_hooks=hooks)  # [layer, row, head, query, key]
    found = torch.stack([rows[layers.index(layer), :, head] for layer, head in watched], dim=1)
    found = found[..., image_columns(batch[0])].float().cpu().numpy()
    return [own[:, : len(reply)] for own, reply in zip(found, replies, strict=True)]


def answer_probability(model: HookedVLM, batch: VLMInputs, answer: str, hooks: Any) -> Float[np.ndarray, "row"]:
    """Probability of exactly this answer and a stop behind it, in each row of a batch of one prompt."""
    stops = model.cfg.eos_token_ids
    expected = torch.tensor(model.tokenizer(answer, add_special_tokens=False)["input_ids"])
    whole = batch.append([expected] * len(batch))
    logits = model.run_with_hooks(whole, fwd_hooks=hooks)[:, batch.shape[1] - 1 :].float()
    probabilities = logits.softmax(-1)  # [row, answer and stop, d_vocab]
    copied = probabilities[:, :-1].gather(-1, expected.to(logits.device).expand(len(batch), -1)[..., None])[..., 0]
    return (copied.prod(-1) * probabilities[:, -1, list(stops)].sum(-1)).cpu().numpy()
