"""The OCR score: how often a head's strongest attention lies on what is being read (papers 1.3 to 1.6).

Per example: generate; find the answer's tokens among the generated ones; read one attention row per answer
token in a pass over prompt and reply, and ask for every head whether its argmax is an image token of that token's
evidence boxes.

A model that reads well says the answer and stops. So the answer is put behind the prompt first: where greedy decoding
would have given just that, this one pass stands for generation and for reading the rows. Only the other examples are
generated token by token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
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
        readings = _expected(model, inputs, chosen, config)
        others = [row for row, reading in enumerate(readings) if reading is None]
        if others:
            found = _generated(model, inputs[others], [chosen[row] for row in others], config)
            readings = [found[others.index(row)] if r is None else r for row, r in enumerate(readings)]
        for example, reading in zip(chosen, readings, strict=True):
            assert reading is not None
            right += example.is_right(model.to_string(reading.reply))
            norms.append(reading.norms)
            n_tokens += sum(c.position is not None for c in reading.copies)
            instances += _instances(reading.copies, reading.hits, protocol)
    shape = (0, model.cfg.n_layers, model.cfg.n_heads)
    return Scores(
        np.stack(instances) if instances else np.zeros(shape),
        np.stack(norms).mean(0),
        right / len(examples),
        len(examples),
        n_tokens,
    )


@dataclass(frozen=True, eq=False)
class _Reading:
    """What was found of one example."""

    reply: list[int]
    copies: list[Copy]
    hits: Bool[np.ndarray, "copy layer head"]
    norms: Float[np.ndarray, "layer head"]


def _generated(model: Any, inputs: VLMInputs, examples: list[Example], config: OcrHeadsConfig) -> list[_Reading]:
    """Generation step by step, then a pass over prompt and reply."""
    generated = model.generate(inputs, config.new_tokens)[:, inputs.shape[1] :]
    replies = [reply_tokens(model, row) for row in generated]
    return [reading for reading, _ in _read(model, inputs, examples, replies, config.measured_by)]


def _expected(model: Any, inputs: VLMInputs, examples: list[Example], config: OcrHeadsConfig) -> list[_Reading | None]:
    """What generation would have found where it would have said the answer and stopped; None elsewhere."""
    stops = list(model.cfg.eos_token_ids)
    answers = [model.tokenizer(e.answer, add_special_tokens=False)["input_ids"] for e in examples]
    longest = max(map(len, answers))
    if not stops or longest >= config.new_tokens or inputs.shape[1] + longest + 1 > model.cfg.n_ctx_limit:
        return [None] * len(examples)
    found = _read(model, inputs, examples, [[*answer, stops[0]] for answer in answers], config.measured_by)
    readings: list[_Reading | None] = []
    for answer, (reading, predicted) in zip(answers, found, strict=True):
        said = predicted[:-1] == answer and predicted[-1] in stops
        readings.append(_without_stop(reading) if said else None)
    return readings


def _without_stop(reading: _Reading) -> _Reading:
    return _Reading(reading.reply[:-1], reading.copies, reading.hits, reading.norms)


def _read(
    model: Any, inputs: VLMInputs, examples: list[Example], replies: list[list[int]], protocol: Protocol
) -> list[tuple[_Reading, list[int]]]:
    """One pass over prompts and replies; with each reading, what greedy decoding gives in the reply's place."""
    continued = inputs.append([torch.tensor(r, dtype=torch.long) for r in replies])
    copies = [find_copies(model, continued, row, e, replies[row], protocol) for row, e in enumerate(examples)]
    hits, norms, predicted = _hits(model, continued, inputs.shape[1], copies, [len(r) for r in replies], protocol)
    return [
        (_Reading(replies[row], copies[row], hits[row], norms[row]), predicted[row]) for row in range(len(examples))
    ]


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
            Copy(start + places[i] + shift if i < len(places) else None, weight, evidence)
            for i, (_, evidence) in enumerate(boxes)
        ]
    copies = []
    for i, (a, b) in enumerate(spans):
        evidence = {t for e, tokens in boxes if e.start < b and a < e.stop for t in tokens}
        if not evidence:
            continue  # white space, or too small a part of any token
        generated = in_answer <= i < in_answer + run
        position = start + in_reply + i - in_answer + shift if generated else None
        copies.append(Copy(position, weight, tuple(sorted(evidence))))
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
    model: Any,
    inputs: VLMInputs,
    n_prompt: int,
    copies: list[list[Copy]],
    n_reply: list[int],
    protocol: Protocol,
) -> tuple[list[Bool[np.ndarray, "copy layer head"]], Float[np.ndarray, "row layer head"], list[list[int]]]:
    """For every copy, which heads' argmax lies in its evidence; the heads' output norms on the prompts; the likeliest
    token where each token of a reply was produced."""
    asked = [[copy.position for copy in own if copy.position is not None] for own in copies]
    width = max(1, *map(len, asked))
    # spare columns hold a harmless query
    positions = torch.tensor(
        [own + [stop - 1] * (width - len(own)) for own, stop in zip(asked, inputs.stop, strict=True)]
    )
    last_key = n_prompt - 1 if protocol.keys == "prompt" else inputs.shape[1]
    norms: dict[int, Tensor] = {}
    predicted: list[list[int]] = []
    prompt = inputs.attention_mask.clone()
    prompt[:, n_prompt:] = 0

    def measure_norm(z: Tensor, hook: Any) -> None:
        norms[hook.layer()] = _output_norm(z, model.blocks[hook.layer()].attn.W_O, prompt)

    def predict(normalized: Tensor, hook: Any) -> None:
        for row, (stop, n) in enumerate(zip(inputs.stop, n_reply, strict=True)):
            predicted.append(model.unembed(normalized[row, stop - n - 1 : stop - 1]).argmax(-1).tolist())

    argmax = attention_rows(
        model,
        inputs,
        positions,
        reduce=lambda rows: rows[..., :last_key].argmax(-1),
        fwd_hooks=[
            (lambda name: name.endswith("attn.hook_z") and name.startswith("blocks."), measure_norm),
            ("ln_final.hook_normalized", predict),
        ],
    ).cpu()
    hits = []
    for row, own in enumerate(copies):
        found = np.zeros((len(own), model.cfg.n_layers, model.cfg.n_heads), dtype=bool)
        generated = [i for i, copy in enumerate(own) if copy.position is not None]
        for column, i in enumerate(generated):
            evidence = torch.tensor(own[i].evidence, dtype=torch.long)
            found[i] = torch.isin(argmax[:, row, :, column], evidence).numpy()
        hits.append(found)
    stacked = torch.stack([norms[layer] for layer in range(model.cfg.n_layers)], dim=1)
    return hits, stacked.float().cpu().numpy(), predicted


def _output_norm(z: Tensor, W_O: Tensor, where: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch head"]:
    """Mean over the positions marked in `where` of the norm of z W_O per head, without making [pos, head, d_model]."""
    gram = torch.einsum("hdm,hem->hde", W_O.float(), W_O.float())
    squared = torch.einsum("bphd,hde,bphe->bph", z.float(), gram, z.float())
    mask = where.to(squared)[:, :, None]
    return (squared.clamp_min(0).sqrt() * mask).sum(1) / mask.sum(1)


def _instances(
    copies: list[Copy], hits: Bool[np.ndarray, "copy layer head"], protocol: Protocol
) -> list[Float[np.ndarray, "layer head"]]:
    """One example's scores: of the sample, |tokens copied| / |answer tokens|, or of each token."""
    values = hits * np.array([c.weight for c in copies])[:, None, None]
    counted = [c.position is not None or protocol.missing == "zero" for c in copies]
    if protocol.instance == "token":
        return [v for v, keep in zip(values, counted, strict=True) if keep]
    return [values[counted].mean(0)] if any(counted) else []
