"""The OCR score: how often a head's strongest attention lies on what is being read (papers 1.3 to 1.6).

Per example: generate; find the answer's tokens among the generated ones; read one attention row per answer
token in a second pass over prompt and reply, and ask for every head whether its argmax is an image token of
that token's evidence boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_vlm.attention_rows import attention_rows
from hooked_vlm.experiments.ocr_heads.config import OcrHeadsConfig, Protocol
from hooked_vlm.experiments.ocr_heads.examples import Example, batches, prompt_length, to_inputs
from hooked_vlm.inputs import VLMInputs


@dataclass(frozen=True, eq=False)
class Scores:
    """Every head's score in every instance (a sample, or a token, as the protocol says)."""

    instances: Float[np.ndarray, "instance layer head"]
    output_norm: Float[np.ndarray, "layer head"]
    """Mean norm of what a head adds to the residual stream, over the prompts' real positions."""
    exact: float
    """Share of examples the model answered rightly."""
    n_samples: int
    n_tokens: int
    """Answer tokens whose attention was read."""

    @property
    def mean(self) -> Float[np.ndarray, "layer head"]:
        return self.instances.mean(0)

    def frequency(self, threshold: float) -> Float[np.ndarray, "layer head"]:
        """Share of instances in which a head scores above `threshold`."""
        return (self.instances > threshold).mean(0)


@dataclass(frozen=True, eq=False)
class Copy:
    """One answer token to look at."""

    row: int
    """Which example of the batch."""
    position: int | None
    """Whose attention row counts; None if the token was not generated."""
    weight: float
    """What a hit counts."""
    evidence: tuple[int, ...]
    """Positions of the image tokens it may be read from."""


def score_heads(model: Any, examples: Sequence[Example], config: OcrHeadsConfig, pixels: int | None) -> Scores:
    """Score every head of `model` on `examples`."""
    protocol = config.measured_by
    instances, norms, right, n_tokens = [], [], 0, 0
    lengths = [prompt_length(model, e, pixels) + config.new_tokens for e in examples]
    groups = batches(lengths, config.tokens_per_batch)
    for group in tqdm(groups, desc="scoring heads", unit="batch", disable=config.quiet):
        chosen = [examples[i] for i in group]
        inputs = to_inputs(model, chosen, pixels)
        inputs = inputs.with_image_features(model.encode_images(inputs).detach())
        generated = model.generate(inputs, config.new_tokens)[:, inputs.shape[1] :]
        replies = [reply_tokens(model, row) for row in generated]
        right += sum(e.is_right(model.to_string(r)) for e, r in zip(chosen, replies, strict=True))
        continued = inputs.append([torch.tensor(r, dtype=torch.long) for r in replies])
        copies = [
            c for row, e in enumerate(chosen) for c in find_copies(model, continued, row, e, replies[row], protocol)
        ]
        hits, batch_norms = _hits(model, continued, inputs.shape[1], copies, protocol)
        norms.append(batch_norms)
        n_tokens += sum(c.position is not None for c in copies)
        instances += _instances(copies, hits, len(chosen), protocol)
    shape = (0, model.cfg.n_layers, model.cfg.n_heads)
    return Scores(
        np.stack(instances) if instances else np.zeros(shape),
        np.concatenate(norms).mean(0),
        right / len(examples),
        len(examples),
        n_tokens,
    )


def reply_tokens(model: Any, row: Tensor) -> list[int]:
    """Generated ids up to the first stop token."""
    stops = set(model.cfg.eos_token_ids)
    ids = row.tolist()
    return ids[: next((i for i, t in enumerate(ids) if t in stops), len(ids))]


def find_copies(
    model: Any, inputs: VLMInputs, row: int, example: Example, reply: list[int], protocol: Protocol
) -> list[Copy]:
    """The answer's tokens in the reply, each with its evidence.

    `inputs` are prompt and reply; the reply starts at `inputs.stop[row] - len(reply)`.
    """
    encoded = model.tokenizer(example.answer, add_special_tokens=False, return_offsets_mapping=True)
    answer, spans = encoded["input_ids"], encoded["offset_mapping"]
    start = inputs.stop[row] - len(reply)
    shift = 0 if protocol.query == "copied" else -1
    in_answer, in_reply, run = longest_run(answer, reply)
    weight = run / len(answer) if protocol.weight_by_run else 1.0
    boxes = [(e, _tokens_of(inputs, row, e, protocol)) for e in example.evidence]
    if protocol.matching == "in_order":
        places = [n for n, token in enumerate(reply) if token in set(answer)]
        if len(boxes) == 1:  # one box around everything: every place is held against it
            boxes = boxes * len(places)
        return [
            Copy(row, start + places[i] + shift if i < len(places) else None, weight, evidence)
            for i, (_, evidence) in enumerate(boxes)
        ]
    copies = []
    for i, (a, b) in enumerate(spans):
        evidence = {t for e, tokens in boxes if e.start < b and a < e.stop for t in tokens}
        if not evidence:
            continue  # white space, or too small a part of any token
        generated = in_answer <= i < in_answer + run
        position = start + in_reply + i - in_answer + shift if generated else None
        copies.append(Copy(row, position, weight, tuple(sorted(evidence))))
    return copies


def longest_run(a: Sequence[int], b: Sequence[int]) -> tuple[int, int, int]:
    """The longest run of equal tokens in both: where it starts in `a` and in `b`, and its length."""
    best = (0, 0, 0)
    lengths = [0] * (len(b) + 1)
    for i, token in enumerate(a):
        previous = 0
        for j, other in enumerate(b):
            diagonal, previous = previous, lengths[j + 1]
            lengths[j + 1] = diagonal + 1 if token == other else 0
            if lengths[j + 1] > best[2]:
                n = lengths[j + 1]
                best = (i - n + 1, j - n + 1, n)
    return best


def _tokens_of(inputs: VLMInputs, row: int, evidence: Any, protocol: Protocol) -> tuple[int, ...]:
    """Positions of the image tokens that hold enough of an evidence box."""
    images = [v for v in inputs.visuals if v.row == row]
    visual = images[evidence.image]
    grid = inputs.image_grid(visual.index)
    found = grid.tokens_in_box(evidence.box, protocol.min_overlap, truncate=protocol.truncate_boxes)
    return tuple(visual.start + i for i in found)


def _hits(
    model: Any, inputs: VLMInputs, n_prompt: int, copies: list[Copy], protocol: Protocol
) -> tuple[Bool[np.ndarray, "copy layer head"], Float[np.ndarray, "row layer head"]]:
    """For every copy, which heads' argmax lies in its evidence; and the heads' output norms on the prompts."""
    by_row: dict[int, list[int]] = {row: [] for row in range(len(inputs))}
    position_of = {i: copy.position for i, copy in enumerate(copies) if copy.position is not None}
    for i in position_of:
        by_row[copies[i].row].append(i)
    width = max(1, *(len(found) for found in by_row.values()))
    positions = torch.tensor([[f - 1] * width for f in inputs.stop])  # spare columns hold a harmless query
    for row, found in by_row.items():
        for column, i in enumerate(found):
            positions[row, column] = position_of[i]
    last_key = n_prompt - 1 if protocol.keys == "prompt" else inputs.shape[1]
    norms: dict[int, Tensor] = {}

    def measure_norm(z: Tensor, hook: Any) -> None:
        norms[hook.layer()] = _output_norm(z, model.blocks[hook.layer()].attn.W_O, inputs)

    argmax = attention_rows(
        model,
        inputs,
        positions,
        reduce=lambda rows: rows[..., :last_key].argmax(-1),
        fwd_hooks=[(lambda name: name.endswith("attn.hook_z") and name.startswith("blocks."), measure_norm)],
    ).cpu()
    hits = np.zeros((len(copies), model.cfg.n_layers, model.cfg.n_heads), dtype=bool)
    for row, found in by_row.items():
        for column, i in enumerate(found):
            evidence = torch.tensor(copies[i].evidence, dtype=torch.long)
            hits[i] = torch.isin(argmax[:, row, :, column], evidence).numpy()
    stacked = torch.stack([norms[layer] for layer in range(model.cfg.n_layers)], dim=1)
    return hits, stacked.float().cpu().numpy()


def _output_norm(z: Tensor, W_O: Tensor, inputs: VLMInputs) -> Float[Tensor, "batch head"]:
    """Mean over real positions of the norm of z W_O per head, without making [pos, head, d_model]."""
    gram = torch.einsum("hdm,hem->hde", W_O.float(), W_O.float())
    squared = torch.einsum("bphd,hde,bphe->bph", z.float(), gram, z.float())
    mask = inputs.attention_mask.to(squared)[:, :, None]
    return (squared.clamp_min(0).sqrt() * mask).sum(1) / mask.sum(1)


def _instances(copies: list[Copy], hits: np.ndarray, n_rows: int, protocol: Protocol) -> list[np.ndarray]:
    """Scores per sample, |tokens copied| / |answer tokens|, or per token."""
    weights = np.array([c.weight for c in copies])[:, None, None]
    values = hits * weights if len(copies) else hits.astype(float)
    counted = [c.position is not None or protocol.missing == "zero" for c in copies]
    if protocol.instance == "token":
        return [v for v, keep in zip(values, counted, strict=True) if keep]
    rows = []
    for row in range(n_rows):
        own = [i for i, c in enumerate(copies) if c.row == row and counted[i]]
        if own:
            rows.append(values[own].mean(0))
    return rows
