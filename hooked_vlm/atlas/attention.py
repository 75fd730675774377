"""Scores of attention in the language model, from the rows of a few queries: no [pos, pos] tensor is made."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vlm.analysis.head_outputs import on_head_outputs, output_norms
from hooked_vlm.atlas.evidence import needle, tokens_of_boxes
from hooked_vlm.atlas.stimuli import REPEATED_LENGTH, Stimulus
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.attention import AttentionCall
from hooked_vlm.nn.hooks import HookPoint

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

MOST_QUERIES = 64
"""Tokens of a question whose attention is looked at; of a longer one so many, evenly spread."""
SINK = 20.0
"""Ratio of |x[d]| to rms(x) from which on a dimension of the stream marks a sink (arXiv 2503.03321)."""
Found = dict[str, tuple[np.ndarray, np.ndarray]]
"""Values and nulls [layer, head] by score."""
Both = dict[str, tuple[Float[Tensor, "head"], Float[Tensor, "head"]]]
"""Values and nulls of one layer by score."""


@dataclass(eq=False)
class Rows:
    """The queries of one row of a batch, and the keys that scores are about."""

    first: int
    """Position of the first token."""
    question: list[int]
    header: list[int]
    """Tokens of the assistant's header; none where a prompt has none."""
    answer: list[int]
    """Positions that predict the answer's tokens."""
    image: Bool[Tensor, "key"]
    evidence: Bool[Tensor, "part key"]
    """For each token of the answer the keys that it may be copied from; none where this is not known."""
    elsewhere: Bool[Tensor, "part key"]
    """The same with the evidence of another stimulus."""
    asked: Bool[Tensor, "key"]
    """Image tokens of what is asked for."""
    predicted: Bool[Tensor, "part"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    """Whether the model predicts the answer's token; known behind the last layer."""

    @property
    def queries(self) -> list[int]:
        """Those of the scores that are about question and answer."""
        return [*self.question, *self.answer]


@torch.no_grad()
def attention_scores(model: "HookedVLM", stimuli: Sequence[Stimulus]) -> list[Found]:
    """The scores of attention on a batch of stimuli of one kind that ask something, and norms of values and outputs;
    for each stimulus, by the name of the score.

    Raises:
        InputError: a stimulus that the model cannot take.
    """
    batch, rows = _batch(model, stimuli)
    sinks: dict[int, Bool[Tensor, "row key"]] = {}
    found: list[list[Both]] = [[] for _ in stimuli]
    looked: list[list[Int[Tensor, "head part"]]] = [[] for _ in stimuli]
    chance: list[list[Float[Tensor, "part"]]] = [[] for _ in stimuli]
    norms: dict[tuple[str, int], Tensor] = {}
    prompt = batch.attention_mask.clone()
    for row, own in enumerate(rows):
        prompt[row, own.answer[0] + 1 :] = 0

    def mark_sinks(x: Tensor, hook: HookPoint) -> None:
        sinks[hook.layer()] = _visual_sinks(x, rows)

    def watch(z: Tensor, hook: HookPoint) -> None:
        call, layer = hook.ctx["attention"], hook.layer()
        norms["value_norm", layer] = _value_norms(call, prompt, model.cfg.n_heads)
        for row, own in enumerate(rows):
            n = len(own.queries)
            whole = _pattern(call, row, [*own.queries, *own.header])
            pattern, uniform = whole[0][:, :n], whole[1][:, :n]
            found[row].append(_scores(pattern, uniform, own, sinks[layer][row]))
            value, null = (a[:, n:, own.image].sum(-1).mean(-1) for a in whole)
            found[row][-1]["image_from_header"] = value, null.expand_as(value)
            looked[row].append(pattern[:, len(own.question) :].argmax(-1))
            chance[row].append((uniform[0, len(own.question) :] * own.evidence).sum(-1))

    def predict(normalized: Tensor, hook: HookPoint) -> None:
        for row, own in enumerate(rows):
            ids = model.unembed(normalized[row, own.answer]).argmax(-1).cpu()
            own.predicted = ids == batch.tokens[row, [q + 1 for q in own.answer]].cpu()

    def written(layer: int, z: Tensor, scale: Tensor | None) -> None:
        norms["output_norm", layer] = output_norms(z, model.blocks[layer], prompt, scale)

    layers = range(model.cfg.n_layers)
    hooks: list[Any] = [(f"blocks.{layer}.hook_resid_pre", mark_sinks) for layer in layers]
    hooks += [(f"blocks.{layer}.attn.hook_z", watch) for layer in layers]
    hooks += [*on_head_outputs(model, written), ("ln_final.hook_out", predict)]
    model.run_with_hooks(batch, return_type=None, fwd_hooks=hooks)
    for row, by_layer in enumerate(found):
        for layer, own in enumerate(by_layer):
            own |= _copying(looked[row][layer], chance[row][layer], rows[row])
            for name in ("value_norm", "output_norm"):
                value = norms[name, layer][row]
                own[name] = value.cpu(), torch.full_like(value.cpu(), torch.nan)
    names = [_names(own, stimulus) for own, stimulus in zip(rows, stimuli, strict=True)]
    return [_stacked(own, wanted) for own, wanted in zip(found, names, strict=True)]


@torch.no_grad()
def repeated_scores(model: "HookedVLM", stimuli: Sequence[Stimulus]) -> list[Found]:
    """Induction, previous-token and duplicate-token scores on repeated tokens, for each stimulus."""
    batch = model.as_inputs(torch.tensor([stimulus.tokens for stimulus in stimuli]))
    n = REPEATED_LENGTH
    begin = batch.shape[1] - 2 * n
    second = torch.arange(begin + n, begin + 2 * n)
    every = torch.arange(1, batch.shape[1])
    targets = {"induction": (second, second - n + 1), "previous_token": (every, every - 1)}
    targets["duplicate_token"] = (second, second - n)
    found: list[list[Both]] = [[] for _ in stimuli]

    def watch(z: Tensor, hook: HookPoint) -> None:
        for row, by_layer in enumerate(found):
            pattern, uniform = _pattern(hook.ctx["attention"], row, list(range(batch.shape[1])))
            by_layer.append(
                {
                    name: (pattern[:, q, k].mean(1), uniform[:, q, k].mean(1).expand(len(pattern)))
                    for name, (q, k) in targets.items()
                }
            )

    hooks = [(f"blocks.{layer}.attn.hook_z", watch) for layer in range(model.cfg.n_layers)]
    model.run_with_hooks(batch, return_type=None, fwd_hooks=hooks)
    return [_stacked(own, list(targets)) for own in found]


# ---------------------------------------------------------------- queries and keys


def _batch(model: "HookedVLM", stimuli: Sequence[Stimulus]) -> tuple[VLMInputs, list[Rows]]:
    """Prompts and answers as one batch, and what is looked at in each row."""
    alone = [stimulus.asked.inputs(model) for stimulus in stimuli]
    batch = model.as_inputs(VLMInputs.concat(alone))
    rows = []
    for row, stimulus in enumerate(stimuli):
        other = stimuli[(row + 1) % len(stimuli)]
        rows.append(_rows(model, batch, row, stimulus, other if other is not stimulus else None))
    return batch, rows


def _rows(model: "HookedVLM", batch: VLMInputs, row: int, stimulus: Stimulus, other: Stimulus | None) -> Rows:
    width, groups = batch.shape[1], batch.positions
    n_answer, stop = batch.n_generated[row], batch.stop[row]
    question = groups.question[row].tolist()
    chosen = np.unique(np.linspace(0, len(question) - 1, min(len(question), MOST_QUERIES)).round().astype(int))
    image = torch.zeros(width, dtype=torch.bool)
    image[groups.image[row]] = True
    if stimulus.kind == "text":
        evidence = needle(model, batch, row)
    else:
        evidence = tokens_of_boxes(model, batch, row, stimulus, stimulus)
    elsewhere = torch.zeros_like(evidence)
    if stimulus.kind == "page" and other is not None:
        elsewhere = tokens_of_boxes(model, batch, row, stimulus, other)
    asked = evidence.any(0) & image
    answer = list(range(stop - n_answer - 1, stop - 1))
    header = groups.assistant_header[row].tolist()
    return Rows(batch.first[row], [question[i] for i in chosen], header, answer, image, evidence, elsewhere, asked)


def _pattern(
    call: AttentionCall, row: int, queries: Sequence[int]
) -> tuple[Float[Tensor, "head query key"], Float[Tensor, "1 query key"]]:
    """Attention of some queries of a row, and uniform attention to the keys that they see."""
    own, at = call.rows(row, row + 1), torch.tensor([list(queries)], device=call.q.device)
    seen = own.visible(at)[0].float()
    return own.pattern(at)[0].float().cpu(), (seen / seen.sum(-1, keepdim=True)).cpu()


def _value_norms(call: AttentionCall, prompt: Int[Tensor, "row pos"], n_heads: int) -> Float[Tensor, "row head"]:
    """Mean norm of the values that each head reads, over the positions marked in `prompt`."""
    norms, mask = call.v.float().norm(dim=-1), prompt.to(call.v.device).float()[:, :, None]
    return ((norms * mask).sum(1) / mask.sum(1)).repeat_interleave(n_heads // call.v.shape[2], dim=1).cpu()


def _visual_sinks(x: Float[Tensor, "row pos d_model"], rows: Sequence[Rows]) -> Bool[Tensor, "row key"]:
    """Image tokens whose stream is large where the first token's is."""
    ratio = x.float().abs() / x.float().pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    marks = torch.stack([ratio[row, own.first] >= SINK for row, own in enumerate(rows)])
    large = ((ratio >= SINK) & marks[:, None]).any(-1).cpu()
    return large & torch.stack([own.image for own in rows])


# ---------------------------------------------------------------- formulas


def _scores(
    pattern: Float[Tensor, "head query key"],
    uniform: Float[Tensor, "1 query key"],
    rows: Rows,
    sinks: Bool[Tensor, "key"],
) -> Both:
    """Every score of a layer's heads, with its null."""
    n = len(rows.question)
    positions = torch.tensor(rows.queries) - rows.first
    distance = positions[:, None] - (torch.arange(pattern.shape[-1]) - rows.first)
    relative = distance.clamp_min(0) / positions.clamp_min(1)[:, None]
    n_keys = (uniform > 0).sum(-1)

    def linear(a: Float[Tensor, "_ query key"]) -> dict[str, Float[Tensor, "_"]]:
        to_image = a[:, n:, rows.image].sum(-1)
        return {
            "image_from_question": a[:, :n, rows.image].sum(-1).mean(-1),
            "image_from_answer": to_image.mean(-1),
            "localisation": (a[:, n:, rows.asked].sum(-1) / to_image).nanmean(-1),
            "first_token_sink": a[..., rows.first].mean(-1),
            "visual_sink": a[..., sinks].sum(-1).mean(-1),
            "locality": 1 - (a * relative).sum(-1).mean(-1),
        }

    values, nulls = linear(pattern), linear(uniform)
    found = {name: (values[name], nulls[name].expand(len(pattern))) for name in values}
    entropy = torch.special.entr(pattern).sum(-1) / n_keys.clamp_min(2).log()
    found["entropy"] = entropy.mean(-1), torch.full((len(pattern),), torch.nan)
    return found


def _copying(looked: Int[Tensor, "head part"], chance: Float[Tensor, "part"], rows: Rows) -> Both:
    """Scores of copying, each with its null: the evidence of another stimulus, or any key that is seen, at random."""
    values, known = _copied(looked, rows.evidence, rows.predicted), rows.evidence.any(-1)
    at_random = (chance * rows.predicted)[known].mean()
    return {
        "ocr": (values, _copied(looked, rows.elsewhere, rows.predicted)),
        "text_retrieval": (values, at_random.expand(len(looked))),
    }


def _copied(
    looked: Int[Tensor, "head part"], evidence: Bool[Tensor, "part key"], predicted: Bool[Tensor, "part"]
) -> Float[Tensor, "head"]:
    """Share of the answer's tokens that are predicted while a head looks at their evidence, among those that have any;
    NaN if none has."""
    hits = evidence.gather(1, looked.T).T & predicted
    return hits[:, evidence.any(-1)].float().mean(-1)


def _names(rows: Rows, stimulus: Stimulus) -> list[str]:
    """The scores that a stimulus is for."""
    names = ["first_token_sink", "locality", "entropy", "value_norm", "output_norm"]
    if stimulus.kind == "text":
        return [*names, *(["text_retrieval"] if rows.evidence.any() else [])]
    names += ["image_from_question", "image_from_answer", "visual_sink"]
    names += ["image_from_header"] if rows.header else []
    names += ["localisation"] if rows.asked.any() else []
    return [*names, "ocr"] if stimulus.kind == "page" else names


def _stacked(by_layer: Sequence[Both], names: Sequence[str]) -> Found:
    """Values and nulls [layer, head] of some scores."""
    return {
        name: (
            torch.stack([own[name][0].cpu() for own in by_layer]).numpy(),
            torch.stack([own[name][1].cpu() for own in by_layer]).numpy(),
        )
        for name in names
    }
