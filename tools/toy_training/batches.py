"""From samples to tensors: chat format, positions, pixels, labels on the answers only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.toys.pages import Sample
from tools.toy_training.families import family_of
from tools.toy_training.family import HFModel, ToyFamily
from tools.toy_training.tokenizer import END_OF_TEXT, IM_END, IM_START

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Conversations with images of one size (or none), padded at the end."""

    tokens: Int[Tensor, "batch pos"]
    labels: Int[Tensor, "batch pos"]  # the token at the position, or -100 outside answers
    position_ids: Int[Tensor, "*axes 1 pos"]  # equal for all rows: the image comes first everywhere
    pixel_values: Float[Tensor, "..."] | None  # of all images, as the family's vision tower takes them
    grid: ImageLayout | None

    def to(self, device: torch.device) -> "Batch":
        return replace(
            self,
            tokens=self.tokens.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
            pixel_values=None if self.pixel_values is None else self.pixel_values.to(device),
        )


def encode(family: ToyFamily, sample: Sample) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, in the family's chat format."""
    tokens: list[int] = []
    labels: list[int] = []

    def extend(ids: Sequence[int], supervised: bool) -> None:
        tokens.extend(ids)
        labels.extend(ids if supervised else [IGNORED] * len(ids))

    def encoded(text: str) -> list[int]:
        """Questions are too many to cache; special tokens and newlines split what is encoded alone."""
        return family.tokenizer.encode(text, add_special_tokens=False).ids

    for turn, (question, answer) in enumerate(sample.turns):
        extend(_ids(family, f"{family.turn_separator if turn else family.prompt_start}{IM_START}user\n"), False)
        if turn == 0 and sample.pixels is not None:
            n_tokens = family.grid(*sample.pixels.shape[:2]).n_tokens
            extend(_ids(family, family.image_text(n_tokens)), False)
        extend(encoded(question), False)
        extend(_ids(family, f"{IM_END}{family.turn_separator}{IM_START}assistant\n"), False)
        extend(encoded(answer), True)
        extend(_ids(family, IM_END), True)
    return tokens, labels


@cache
def _ids(family: ToyFamily, text: str) -> tuple[int, ...]:
    return tuple(family.tokenizer.encode(text, add_special_tokens=False).ids)


def collate(family: ToyFamily, samples: Sequence[Sample]) -> Batch:
    encoded = [encode(family, sample) for sample in samples]
    length = max(len(tokens) for tokens, _ in encoded)
    pad = _ids(family, END_OF_TEXT)[0]
    tokens = torch.full((len(samples), length), pad)
    labels = torch.full((len(samples), length), IGNORED)
    for row, (ids, targets) in enumerate(encoded):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(targets)
    pixel_values, grid = None, None
    if samples[0].pixels is not None:
        images = torch.from_numpy(np.stack([np.asarray(sample.pixels) for sample in samples]))
        pixel_values, grid = family.pixel_values(images), family.grid(images.shape[1], images.shape[2])
    return Batch(tokens, labels, family.positions(length, grid), pixel_values, grid)


def decoder_output(model: HFModel, batch: Batch, **kwargs: bool) -> Any:
    """The decoder's last hidden state; causal attention alone suffices because padding is at the end."""
    embedded = model.model.language_model.embed_tokens(batch.tokens)
    if batch.pixel_values is not None and batch.grid is not None:
        family = family_of(model)
        features = family.image_features(model, batch.pixel_values, batch.grid)
        start, end = family.image_start, family.image_start + batch.grid.n_tokens
        embedded = torch.cat([embedded[:, :start], features.to(embedded.dtype), embedded[:, end:]], dim=1)
    return model.model.language_model(
        inputs_embeds=embedded, position_ids=batch.position_ids, use_cache=False, **kwargs
    )


def answer_logits(
    model: HFModel, batch: Batch, patterns: list[Tensor] | None = None, residuals: list[Tensor] | None = None
) -> tuple[Float[Tensor, "answer_token vocab"], Int[Tensor, " answer_token"], Bool[Tensor, "batch pos"]]:
    """Logits where an answer token is produced, the tokens, and where they stand (producing position).

    ``patterns`` receives each layer's attention [batch head query key], if attention runs step by step, and
    ``residuals`` what enters each layer [batch pos d_model], with the decoder's output after the last.
    """
    targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    producing = targets != IGNORED
    output = decoder_output(
        model, batch, output_attentions=patterns is not None, output_hidden_states=residuals is not None
    )
    if patterns is not None:
        patterns.extend(output.attentions)
    if residuals is not None:
        residuals.extend(output.hidden_states)
    hidden = output.last_hidden_state[producing]
    return model.lm_head(hidden), targets[producing], producing
