"""Per-head measurements on a toy model: OCR score, output norm, and running with heads switched off.

These work on ``transformers``' model directly, because training needs them; the study in
``experiments/ocr_heads`` measures the same scores through this library's hooks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.toys.pages import Box, Sample
from tools.toy_training.batches import IGNORED, Batch, collate, decoder_output
from tools.toy_training.families import family_of
from tools.toy_training.family import HFModel, text_shape

Head = tuple[int, int]  # layer, head
EVIDENCE_SHARE = 0.1  # of a character's area, that a token must hold more than


@contextmanager
def kept_heads(model: HFModel, keep: Float[Tensor, "layer batch head"]) -> Iterator[None]:
    """Multiplies each head's output, before ``o_proj`` mixes the heads, by its entry (0 removes it)."""
    handles = []
    for layer, block in enumerate(model.model.language_model.layers):
        gate = keep[layer][:, None, :, None]  # batch 1 head 1

        def scale(_module: object, args: tuple[Tensor], gate: Tensor = gate) -> tuple[Tensor]:
            z = args[0].unflatten(-1, (gate.shape[2], -1))
            return ((z * gate).flatten(-2),)

        handles.append(block.self_attn.o_proj.register_forward_pre_hook(scale))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def head_mask(shape: tuple[int, int], heads: Sequence[Head], batch: int) -> Float[Tensor, "layer batch head"]:
    """Ones of ``shape`` (layers, heads) with zeros at ``heads``, for every row of a batch."""
    keep = torch.ones(shape[0], batch, shape[1])
    for layer, head in heads:
        keep[layer, :, head] = 0
    return keep


def answer_boxes(sample: Sample) -> list[list[Box | None]]:
    """For every turn, the box of each answer token (none for the separator and for other answers)."""
    if sample.char_boxes:
        return [list(sample.char_boxes)]
    if sample.page is None or not sample.target_lines:
        return []
    turns = []
    for (_, answer), index in zip(sample.turns, sample.target_lines, strict=True):
        line = sample.page.lines[index]
        whole_line = [*line.key_boxes, None, *line.value_boxes]  # the separator is one token
        turns.append(whole_line if len(answer) > len(line.value) else list(line.value_boxes))
    return turns


def evidence_mask(samples: Sequence[Sample], batch: Batch) -> Bool[np.ndarray, "batch pos image_token"]:
    """At the position that produces a character, the image tokens where that character is drawn."""
    assert batch.grid is not None
    mask = np.zeros((*batch.tokens.shape, batch.grid.n_tokens), bool)
    labels = batch.labels.cpu().numpy()
    for row, sample in enumerate(samples):
        supervised = np.flatnonzero(labels[row] != IGNORED)
        starts = supervised[np.diff(supervised, prepend=-2) > 1]  # the first token of each answer
        for start, boxes in zip(starts, answer_boxes(sample), strict=False):
            for index, box in enumerate(boxes):
                if box is not None:
                    mask[row, start - 1 + index] = batch.grid.overlaps(box) > EVIDENCE_SHARE
    return mask


@contextmanager
def visible_patterns(model: HFModel) -> Iterator[None]:
    """Attention computed step by step, because the fused kernel returns no pattern."""
    config = model.model.language_model.config
    implementation = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = implementation


@torch.no_grad()
def ocr_scores(model: HFModel, samples: Sequence[Sample]) -> Float[np.ndarray, "layer head"]:
    """Share of answer characters at whose production a head's argmax lies on that character's tokens.

    The row is that of the query which produces the character; the answer is fed, not generated. All
    images have one size.
    """
    device, family = next(model.parameters()).device, family_of(model)
    hits = []
    for first in range(0, len(samples), 64):
        part = samples[first : first + 64]
        batch = collate(family, part).to(device)
        with visible_patterns(model):
            attentions = decoder_output(model, batch, output_attentions=True).attentions
        evidence = evidence_mask(part, batch)
        rows, queries = np.nonzero(evidence.any(-1))
        # layer, character, head: the position attended most
        attended = np.stack([p.argmax(-1).cpu().numpy()[rows, :, queries] for p in attentions]) - family.image_start
        in_image = (attended >= 0) & (attended < evidence.shape[-1])
        where = np.clip(attended, 0, evidence.shape[-1] - 1)
        hits.append(evidence[rows[None, :, None], queries[None, :, None], where] & in_image)
    return np.concatenate(hits, axis=1).mean(1)


@torch.no_grad()
def output_norms(model: HFModel, samples: Sequence[Sample]) -> Float[np.ndarray, "layer head"]:
    """Mean norm of each head's contribution to the residual stream over the produced answer tokens."""
    device = next(model.parameters()).device
    batch = collate(family_of(model), samples).to(device)
    producing = torch.roll(batch.labels != IGNORED, -1, dims=1)
    _, n_heads = text_shape(model)
    norms: list[Tensor] = []
    handles = []
    for block in model.model.language_model.layers:

        def measure(module: torch.nn.Linear, args: tuple[Tensor], _out: Tensor) -> None:
            z = args[0][producing].unflatten(-1, (n_heads, -1))
            weight = module.weight.unflatten(1, (n_heads, -1))
            norms.append(torch.einsum("thd,mhd->thm", z, weight).norm(dim=-1).mean(0))

        handles.append(block.self_attn.o_proj.register_forward_hook(measure))
    try:
        decoder_output(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(norms).cpu().numpy()
