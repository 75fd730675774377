"""Logit lens, head lens and direct logit attribution: streams, heads and MLPs read in the vocabulary.

    lens = logit_lens(model, inputs, "image", targets=[answer])
    lens.on_image(inputs, picture)            # probability of the answer, layer by layer
    head_lens(model, inputs, [answer])        # output of each head at the last token
    logit_attribution(model, inputs, answer)  # parts whose sum is the logit

Nothing of size positions x vocabulary is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from hooked_vlm.analysis.head_outputs import on_head_outputs
from hooked_vlm.analysis.pictures import heatmap, overlay
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.boxes import Part
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import Positions, position_table
from hooked_vlm.metrics import Tokens, tokens_of_rows
from hooked_vlm.nn.components import soft_capped
from hooked_vlm.nn.hooks import HookPoint, deepstack_points, silent_hook_points

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

CHUNK = 256
"""Number of positions whose logits are computed at a time."""


@dataclass(frozen=True, eq=False)
class LogitLens:
    """Predictions from the stream at some positions, layer by layer, through the final norm and the unembedding."""

    layers: tuple[int, ...]
    """l is the stream that enters layer l; the number of layers is the output of the last one."""
    rows: Int[np.ndarray, "entry"]
    positions: Int[np.ndarray, "entry"]
    """Position and row of each entry."""
    top_tokens: Int[np.ndarray, "layer entry top"]
    """Most likely tokens, best first."""
    top_probs: Float[np.ndarray, "layer entry top"]
    targets: tuple[int, ...]
    target_log_probs: Float[np.ndarray, "layer entry target"]
    target_ranks: Int[np.ndarray, "layer entry target"]
    """Number of tokens more likely than the target."""

    def to_dataframe(self, model: "HookedVLM") -> pd.DataFrame:
        """A line for each layer, position and rank: `layer`, `row`, `position`, `rank`, `token`, `text`, `prob`."""
        n_layers, n_entries, top = self.top_tokens.shape
        tokens = self.top_tokens.reshape(-1)
        text = {int(t): model.to_string([int(t)]) for t in np.unique(tokens)}
        return pd.DataFrame(
            {
                "layer": np.repeat(self.layers, n_entries * top),
                "row": np.tile(np.repeat(self.rows, top), n_layers),
                "position": np.tile(np.repeat(self.positions, top), n_layers),
                "rank": np.tile(np.arange(top), n_layers * n_entries),
                "token": tokens,
                "text": [text[int(t)] for t in tokens],
                "prob": self.top_probs.reshape(-1),
            }
        )

    def heatmap(self, target: int = 0, row: int = 0, title: str = "") -> Figure:
        """The probability of a target (by its place among `targets`) by layer and position of a row."""
        own = np.flatnonzero(self.rows == row)
        values = np.exp(self._of_target(target)[:, own])
        return heatmap(values, self.layers, self.positions[own].tolist(), ("layer", "position"), "probability", title)

    def on_image(
        self,
        inputs: VLMInputs,
        picture: Any,
        image: int = 0,
        target: int = 0,
        part: Part = "tiles",
        title: str = "",
    ) -> Figure:
        """The probability of a target at the image's tokens, over the picture, a panel for each layer.

        Raises:
            InputError: the lens did not look at the image.
        """
        tokens, row = inputs.image_tokens(image).numpy(), inputs.row_of_image(image)
        at = {int(p): i for i, p in enumerate(self.positions) if self.rows[i] == row}
        if not all(int(t) in at for t in tokens):
            raise InputError(f'the lens did not look at image {image}: logit_lens(model, inputs, "image", ...)')
        values = np.exp(self._of_target(target)[:, [at[int(t)] for t in tokens]])
        panels = inputs.on_image(image, values, part)
        figure = overlay(picture, panels, [f"layer {layer}" for layer in self.layers], "probability")
        figure.suptitle(title)
        return figure

    def _of_target(self, target: int) -> Float[np.ndarray, "layer entry"]:
        if not 0 <= target < len(self.targets):
            raise InputError(f"there is no target {target}: this lens was given {len(self.targets)}, counted from 0")
        return self.target_log_probs[..., target]


@torch.no_grad()
def logit_lens(
    model: "HookedVLM",
    inputs: VLMInputs,
    positions: Positions = None,
    *,
    targets: Tokens = (),
    layers: Sequence[int] | None = None,
    top: int = 5,
) -> LogitLens:
    """Compute the logit lens (nostalgebraist 2020) at image and text positions, in one forward pass.

    Args:
        positions: a group ("image", "question", "final", ...), positions, or all.
        targets: token ids whose probabilities are wanted, at every position.
        layers: as in `LogitLens.layers`; all by default.
        top: number of most likely tokens to keep.

    Raises:
        InputError: positions, layers or tokens that do not exist.
    """
    inputs = model.as_inputs(inputs)
    n_layers, d_vocab = model.cfg.n_layers, model.cfg.d_vocab
    if not 1 <= top <= d_vocab:
        raise InputError(f"top must be 1 to {d_vocab}, the size of the vocabulary, got {top}")
    chosen = tuple(range(n_layers + 1)) if layers is None else tuple(layers)
    if not chosen:
        raise InputError("no layer is chosen: leave layers out for all of them")
    for layer in chosen:
        if not 0 <= layer <= n_layers:
            raise InputError(
                f"layer {layer} is out of range: streams enter layers 0 to {n_layers - 1} or leave ({n_layers})"
            )
    entries = position_table(positions, inputs)[:, :-1].nonzero()
    rows, columns = entries.to(inputs.device).unbind(1)
    if not len(entries):
        raise InputError(f"these inputs have no {positions} positions")
    wanted = torch.as_tensor(targets, dtype=torch.long).reshape(-1).cpu()
    tokens_of_rows(wanted, len(wanted), d_vocab, wanted.device)
    found: dict[int, tuple[np.ndarray, ...]] = {}

    def read(layer: int) -> Any:
        return lambda x, hook: found.__setitem__(
            layer, _read(model, x.to(inputs.device)[rows, columns], wanted.to(inputs.device), top)
        )

    hooks = [(_stream(layer, n_layers), read(layer)) for layer in chosen]
    model.run_with_hooks(inputs, return_type=None, fwd_hooks=hooks)
    tokens, probs, log_probs, ranks = (np.stack(part) for part in zip(*(found[x] for x in chosen), strict=True))
    at = entries.numpy()
    return LogitLens(chosen, at[:, 0], at[:, 1], tokens, probs, tuple(wanted.tolist()), log_probs, ranks)


def _stream(layer: int, n_layers: int) -> str:
    return f"blocks.{n_layers - 1}.hook_resid_post" if layer == n_layers else f"blocks.{layer}.hook_resid_pre"


def _read(
    model: "HookedVLM", stream: Float[Tensor, "entry d_model"], targets: Tensor, top: int
) -> tuple[np.ndarray, ...]:
    parts = []
    for part in stream.split(CHUNK):
        log_probs = vocabulary(model, part)
        best = log_probs.topk(top, dim=-1)
        own = log_probs[:, targets]
        ranks = torch.stack([(log_probs > one[:, None]).sum(-1) for one in own.T], -1) if len(targets) else own.long()
        parts.append((best.indices, best.values.exp(), own, ranks))
    return tuple(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))


def vocabulary(model: "HookedVLM", written: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims d_vocab"]:
    """Log-probabilities of a vector in the stream by itself: final norm, unembedding, softmax."""
    with silent_hook_points():  # its hooks belong to runs
        logits = model.unembed(model.ln_final(written))
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


# ---------------------------------------------------------------- heads


@torch.no_grad()
def head_lens(
    model: "HookedVLM", inputs: VLMInputs, targets: Tokens, positions: Positions = "final"
) -> Float[np.ndarray, "batch layer head"]:
    """The probability of a token in the output of each head: softmax(W_U norm(W_O z)), averaged over positions. Under a
    norm behind attention the output is what that norm makes of it (`Block.head_outputs`).

    Averaged over images and the first tokens of their words, this is the score of the "OCR lens" (arXiv 2609.18823).

    Args:
        targets: a token id for each row, or one for all.
        positions: by default the prompt's last token.

    Raises:
        InputError: a row without such positions, or a number of targets that is not that of the rows.
    """
    inputs = model.as_inputs(inputs)
    table = position_table(positions, inputs)[:, :-1]
    wanted = tokens_of_rows(targets, len(inputs), model.cfg.d_vocab, inputs.device)
    if not table.any(1).all():
        raise InputError(f"row {int((~table.any(1)).nonzero()[0])} has no such positions")
    rows, columns = table.to(inputs.device).nonzero().unbind(1)
    found: dict[int, Tensor] = {}

    def read(layer: int, z: Tensor, scale: Tensor | None) -> None:
        here = rows.to(z.device), columns.to(z.device)
        written = model.blocks[layer].head_outputs(z[here], None if scale is None else scale[here]).to(inputs.device)
        index = wanted[rows, None, None].expand(-1, written.shape[1], 1)
        n = max(1, CHUNK // written.shape[1])
        parts = zip(written.split(n), index.split(n), strict=True)
        own = torch.cat([vocabulary(model, part).gather(-1, at)[..., 0].exp() for part, at in parts])
        counts = torch.bincount(rows, minlength=len(inputs))
        found[layer] = own.new_zeros(len(inputs), own.shape[1]).index_add(0, rows, own) / counts[:, None]

    model.run_with_hooks(inputs, return_type=None, fwd_hooks=on_head_outputs(model, read))
    return torch.stack([found[layer] for layer in range(model.cfg.n_layers)], 1).cpu().double().numpy()


# ---------------------------------------------------------------- direct logit attribution

Unit = Literal["layer", "component", "head"]
"""Parts that a logit is decomposed into: layers; attention and MLP of each; or heads and MLPs."""


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """A logit (or a difference of two) of each row's last token as a sum over parts of the model."""

    labels: tuple[str, ...]
    """"embed", then "L2", "L2 attn", "L2 mlp" or "L2H0"; "L0 deepstack" for image features behind block 0."""
    values: Float[np.ndarray, "part row"]
    logit: Float[np.ndarray, "row"]
    """The model's logit, before a soft cap if it has one; equal to the sum of the parts up to rounding."""

    def to_dataframe(self) -> pd.DataFrame:
        """A line for each part and row: `part`, `row`, `value`."""
        n_parts, n_rows = self.values.shape
        labels = np.repeat(self.labels, n_rows)
        return pd.DataFrame({"part": labels, "row": np.tile(np.arange(n_rows), n_parts), "value": self.values.ravel()})


@torch.no_grad()
def logit_attribution(
    model: "HookedVLM",
    inputs: VLMInputs,
    right: Tokens,
    wrong: Tokens | None = None,
    unit: Unit = "component",
) -> LogitAttribution:
    """Direct logit attribution: what each part adds to the logit of `right` (minus that of `wrong`) without the help of
    later ones. The final norm's denominator is that of the run, its weight is applied; where heads are told apart, so
    it is with norms behind attention. Logits are taken before a soft cap, under which parts would not sum.

    Args:
        right: a token id for each row, or one for all.
        wrong: likewise.

    Raises:
        InputError: an unknown unit, tokens that do not exist, or parts that do not sum to the logit because a hook or
            another module changes the stream elsewhere.
    """
    if unit not in ("layer", "component", "head"):
        raise InputError(f'unit must be "layer", "component" or "head", got {unit!r}')
    inputs = model.as_inputs(inputs)
    rows = torch.arange(len(inputs), device=inputs.device)
    last = torch.tensor(inputs.stop, device=inputs.device) - 1
    signed = [(tokens, sign) for tokens, sign in ((right, 1), (wrong, -1)) if tokens is not None]
    asked = [(tokens_of_rows(t, len(rows), model.cfg.d_vocab, inputs.device), sign) for t, sign in signed]
    found: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        # the final norm sees each row's last token only
        x = x.to(inputs.device)
        found[str(hook.name)] = x[:, 0] if str(hook.name).startswith("ln_final") else x[rows, last]

    attention = "attn.hook_z" if unit == "head" else "hook_attn_out"
    layers = range(model.cfg.n_layers)
    names = ["hook_embed", "ln_final.hook_scale", "ln_final.hook_out"]
    names += [f"blocks.{layer}.{suffix}" for layer in layers for suffix in (attention, "hook_mlp_out")]
    post_scales = [f"blocks.{layer}.ln1_post.hook_scale" for layer in layers]
    names += post_scales if unit == "head" and model.cfg.use_normalization_before_and_after else []
    entering = deepstack_points(model.cfg.n_deepstack if inputs.has_visuals else 0)
    names += entering
    logits = model.run_with_hooks(inputs, fwd_hooks=[(name, keep) for name in names], logits_at="last")[:, 0]
    parts: dict[str, Tensor] = {"embed": found["hook_embed"]}
    for layer in layers:
        wrote, mlp = found[f"blocks.{layer}.{attention}"], found[f"blocks.{layer}.hook_mlp_out"]
        if unit == "layer":
            parts[f"L{layer}"] = wrote + mlp
        elif unit == "component":
            parts[f"L{layer} attn"], parts[f"L{layer} mlp"] = wrote, mlp
        else:
            block, scale = model.blocks[layer], found.get(post_scales[layer])
            by_head = block.head_outputs(wrote, scale).to(mlp.device).unbind(1)
            parts |= {f"L{layer}H{head}": own for head, own in enumerate(by_head)}
            bias = block.attn.output_bias()
            if bias is not None and bias.any():
                bias = bias if scale is None else block.ln1_post.frozen(bias, scale)
                parts[f"L{layer} b_O"] = bias.to(mlp.device).expand_as(mlp)
            parts[f"L{layer} mlp"] = mlp
    parts |= {f"L{layer} deepstack": found[name] for layer, name in enumerate(entering)}
    exact = torch.promote_types(logits.dtype, torch.float32)
    direction = sum(sign * model.W_U.T[tokens].to(exact) for tokens, sign in asked)
    per_unit = direction * model.ln_final.factor.to(exact) / found["ln_final.hook_scale"].to(exact)
    values = torch.stack([(part.to(exact) * per_unit).sum(-1) for part in parts.values()])
    rounding = 32 * torch.finfo(logits.dtype).eps * values.abs().sum(0)
    given = [logits[rows, tokens].to(exact) for tokens, _ in asked]
    normalized, cap = found["ln_final.hook_out"].to(exact), model.cfg.output_logits_soft_cap
    before = given if cap is None else [(normalized * model.W_U.T[tokens].to(exact)).sum(-1) for tokens, _ in asked]
    true = torch.stack([sign * own for own, (_, sign) in zip(before, asked, strict=True)]).sum(0)
    off = [values.sum(0) - true, *(soft_capped(x, cap) - y for x, y in zip(before, given, strict=True))]
    if not (torch.stack(off).abs() <= rounding).all():
        raise InputError(
            f"the parts sum to {values.sum(0).tolist()}, but the logits are {true.tolist()}: a hook or another module "
            "changes the stream or the logits outside of attention and MLPs. Remove it to attribute logits"
        )
    return LogitAttribution(tuple(parts), values.double().cpu().numpy(), true.double().cpu().numpy())
