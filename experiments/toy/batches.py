"""From samples to tensors: chat format, M-RoPE positions, labels on the answers only."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from hooked_vlm.experiments.toy.data import Sample
from hooked_vlm.experiments.toy.model import MERGE_SIZE, PATCH_SIZE, HFModel, patches_of
from hooked_vlm.experiments.toy.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE_PAD,
    VISION_END,
    VISION_START,
    build_tokenizer,
)

IGNORED = -100


@functools.cache
def _tokenizer() -> Tokenizer:
    return build_tokenizer()


@functools.cache
def _ids(text: str) -> tuple[int, ...]:
    return tuple(_tokenizer().encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True)
class Batch:
    """Conversations with images of one size (or none), padded at the end."""

    tokens: Int[Tensor, "batch pos"]
    labels: Int[Tensor, "batch pos"]  # the token at the position, or -100 outside answers
    position_ids: Int[Tensor, "3 1 pos"]  # equal for all rows: the image comes first everywhere
    images: UInt8[Tensor, "batch height width 3"] | None

    def to(self, device: torch.device) -> "Batch":
        images = None if self.images is None else self.images.to(device)
        return Batch(self.tokens.to(device), self.labels.to(device), self.position_ids.to(device), images)


def image_grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of image tokens."""
    token = PATCH_SIZE * MERGE_SIZE
    return height // token, width // token


def encode(sample: Sample) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, in the tokenizer's chat template."""
    tokens: list[int] = []
    labels: list[int] = []

    def extend(ids: Sequence[int], supervised: bool) -> None:
        tokens.extend(ids)
        labels.extend(ids if supervised else [IGNORED] * len(ids))

    for turn, (question, answer) in enumerate(sample.turns):
        extend(_ids(f"{IM_START}user\n"), False)
        if turn == 0 and sample.pixels is not None:
            rows, columns = image_grid(*sample.pixels.shape[:2])
            image = [*_ids(VISION_START), *(_ids(IMAGE_PAD) * (rows * columns)), *_ids(VISION_END)]
            extend(image, False)
        # Questions are too many to cache; special tokens and newlines split what is encoded alone.
        extend(_tokenizer().encode(question, add_special_tokens=False).ids, False)
        extend(_ids(f"{IM_END}\n{IM_START}assistant\n"), False)
        extend(_tokenizer().encode(answer, add_special_tokens=False).ids, True)
        extend(_ids(IM_END), True)
        extend(_ids("\n"), False)
    return tokens[:-1], labels[:-1]


def mrope_positions(length: int, grid: tuple[int, int] | None) -> Int[Tensor, "3 1 pos"]:
    """Qwen2-VL's positions for an image of ``grid`` tokens after ``<|im_start|>user\\n<|vision_start|>``."""
    positions = np.empty((3, length), np.int64)
    if grid is None:
        positions[:] = np.arange(length)
    else:
        start, (rows, columns) = 4, grid
        size = rows * columns
        positions[:, :start] = np.arange(start)
        positions[0, start : start + size] = start
        positions[1, start : start + size] = start + np.repeat(np.arange(rows), columns)
        positions[2, start : start + size] = start + np.tile(np.arange(columns), rows)
        positions[:, start + size :] = start + max(grid) + np.arange(length - start - size)
    return torch.from_numpy(positions)[:, None]


def collate(samples: Sequence[Sample]) -> Batch:
    encoded = [encode(sample) for sample in samples]
    length = max(len(tokens) for tokens, _ in encoded)
    pad = _ids(END_OF_TEXT)[0]
    tokens = torch.full((len(samples), length), pad)
    labels = torch.full((len(samples), length), IGNORED)
    for row, (ids, targets) in enumerate(encoded):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(targets)
    images, grid = None, None
    if samples[0].pixels is not None:
        images = torch.from_numpy(np.stack([np.asarray(sample.pixels) for sample in samples]))
        grid = image_grid(images.shape[1], images.shape[2])
    return Batch(tokens, labels, mrope_positions(length, grid), images)


def decoder_output(model: HFModel, batch: Batch, **kwargs: bool) -> Any:
    """The decoder's last hidden state; causal attention alone suffices because padding is at the end."""
    embedded = model.model.language_model.embed_tokens(batch.tokens)
    if batch.images is not None:
        n, height, width, _ = batch.images.shape
        grid = torch.tensor([[1, height // PATCH_SIZE, width // PATCH_SIZE]]).expand(n, -1)
        features = model.model.visual(patches_of(batch.images), grid_thw=grid.to(batch.tokens.device)).pooler_output
        rows, columns = image_grid(height, width)
        start = 4
        embedded = torch.cat(
            [
                embedded[:, :start],
                features.view(n, rows * columns, -1).to(embedded.dtype),
                embedded[:, start + rows * columns :],
            ],
            dim=1,
        )
    return model.model.language_model(
        inputs_embeds=embedded, position_ids=batch.position_ids, use_cache=False, **kwargs
    )


def answer_logits(
    model: HFModel, batch: Batch, patterns: list[Tensor] | None = None
) -> tuple[Float[Tensor, "answer_token vocab"], Int[Tensor, " answer_token"], Bool[Tensor, "batch pos"]]:
    """Logits where an answer token is produced, the tokens, and where they stand (producing position).

    ``patterns`` receives each layer's attention [batch head query key], if attention runs step by step.
    """
    targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    producing = targets != IGNORED
    output = decoder_output(model, batch, output_attentions=patterns is not None)
    if patterns is not None:
        patterns.extend(output.attentions)
    hidden = output.last_hidden_state[producing]
    return model.lm_head(hidden), targets[producing], producing
