"""Rankings of heads that attribution is compared with."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.analysis.head_outputs import on_head_outputs
from hooked_vlm.experiments.head_attribution.ablation import Probe
from hooked_vlm.experiments.head_attribution.config import Regression
from hooked_vlm.experiments.head_attribution.regression import chosen
from hooked_vlm.nn.scores import attention_pattern

RANKINGS = {
    "attribution": "head attribution",
    "attribution_2x": "head attribution, two runs per head",
    "attribution_1x": "head attribution, one run per head",
    "alone_single": "single head kept + ablated",
    "alone": "single head kept",
    "single": "single-head ablation",
    "attention": "attention to the image",
    "attention_final": "attention of the final token",
    "value_weighted": "value-weighted attention",
    "gradient": "attribution patching",
    "random": "random",
}
"""Name of each ranking: column in the tables -> label in the figures."""
BUDGETS = {"attribution_1x": 1, "attribution_2x": 2}
"""Rankings by attribution from few masks -> masks per head."""
EQUAL_BUDGET = {"single": "attribution_1x", "alone": "attribution_1x", "alone_single": "attribution_2x"}
"""Rankings by runs of single heads -> attribution from as many runs."""
Scores = Float[np.ndarray, "layer head"]


def runs_per_picture(ranking: str, n_heads: int, n_masks: int) -> int:
    """Model runs that a ranking costs, those with all heads and none apart. A backward pass counts as a run."""
    fixed = {"attribution": n_masks, "attention": 1, "attention_final": 1, "value_weighted": 1, "gradient": 2}
    per_head = BUDGETS | {"single": 1, "alone": 1, "alone_single": 2}
    return fixed[ranking] if ranking in fixed else n_heads * per_head.get(ranking, 0)


def with_sums(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the ranking by what a head adds alone plus what is lost without it; all in the order of `RANKINGS`."""
    scores = scores | {"alone_single": scores["alone"] + scores["single"]}
    return {name: scores[name] for name in RANKINGS if name in scores}


def at_budgets(
    kept: Bool[np.ndarray, "mask head"], values: Float[np.ndarray, "mask"], n_train: int, kind: Regression
) -> dict[str, np.ndarray]:
    """Coefficients from the first masks, one and two per head; ridge, as these hardly determine least squares.

    Budgets that exceed the training masks are left out.
    """
    kind = "ridge" if kind == "ols" else kind
    found = {}
    for name, per_head in BUDGETS.items():
        n = per_head * kept.shape[1]
        if n <= n_train:
            x, y = kept[:n].astype(float), values[:n]
            found[name] = chosen(kind, x, y).fit(x, y).coef_
    return found


def other_rankings(probe: Probe) -> pd.DataFrame:
    """Scores of every ranking that needs no random masks, one row per head; attention to the image is that of the
    language model's heads."""
    full, none = probe.ends
    each = np.eye(len(probe.heads), dtype=bool)
    dropped, alone = np.split(probe.over_heads(np.concatenate((~each, each))), 2)
    columns = {"single": full - dropped, "alone": alone - none}
    if probe.tower == "language":
        kinds = ("attention", "attention_final", "value_weighted")
        columns |= {kind: own.ravel() for kind, own in zip(kinds, attention_scores_of(probe), strict=True)}
    columns |= {"gradient": gradients(probe).ravel()}
    heads = pd.DataFrame(probe.heads, columns=["layer", "head"])
    return heads.assign(**{name: column.astype(float) for name, column in columns.items()})


@torch.no_grad()
def attention_scores_of(probe: Probe) -> tuple[Scores, Scores, Scores]:
    """Attention to the image: from all text, from the final token, and from all text weighted by values.

    sum_j a_j, or sum_j a_j ||v_j W_O|| (Kobayashi et al. 2020), over image tokens j; in place of v_j W_O what a norm
    behind attention makes of it (`Block.head_outputs`). "All text" is the mean over the positions behind the image.
    """
    model, inputs = probe.model, probe.case.inputs
    image, queries = list(probe.image), torch.tensor(probe.text, device=inputs.device)
    found: dict[int, Tensor] = {}
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(layer: int, z: Tensor, post_scale: Tensor | None) -> None:
        rows, v = seen.pop(layer)
        values = v.repeat_interleave(z.shape[2] // v.shape[1], dim=1)
        one = None if post_scale is None else torch.ones_like(post_scale[0, : len(values)])
        norms = model.blocks[layer].head_outputs(values, one).float().norm(dim=-1).T
        mass, weighted = rows.sum(-1), (rows * norms[:, None]).sum(-1)  # [head, query]
        if post_scale is not None:
            weighted = weighted / post_scale[0, queries, 0]
        found[layer] = torch.stack((mass.mean(-1), mass[:, -1], weighted.mean(-1)))

    def see(z: Tensor, hook: Any) -> None:
        call = hook.ctx["attention"]
        rows = attention_pattern(call.scores(queries[None]), keep_float32=True)[0][..., image]
        seen[hook.layer()] = rows, call.v[0, image]

    layers = range(model.cfg.n_layers)
    hooks = [(f"blocks.{layer}.attn.hook_z", see) for layer in layers]
    model.run_with_hooks(inputs, fwd_hooks=[*hooks, *on_head_outputs(model, watch)])
    mass, of_final, weighted = torch.stack([found[layer] for layer in layers], dim=1).double().cpu().numpy()
    return mass, of_final, weighted


def gradients(probe: Probe) -> Float[np.ndarray, "layer head"]:
    """Attribution patching: derivative of the target by how much of the image each head sees (in the vision tower: by
    how much of its output it writes).

    A head's z is z~ + m (z - z~), where z~ is its z under the ablation; the derivative by m at 1 is a first-order
    estimate of the effect of ablating the head (Nanda 2023), for all heads in one forward and backward pass.
    """
    model, inputs = probe.model, probe.case.inputs
    kept = torch.ones(probe.shape, device=inputs.device, requires_grad=True)

    def soften(ablate: Any) -> Any:
        def hook_fn(z: Tensor, hook: Any) -> Tensor:
            lost = z - ablate(z.detach(), hook)
            return z + (kept[hook.layer()][:, None].to(z) - 1) * lost.detach()

        return hook_fn

    hooks = probe.ablated(probe.heads).hooks(model, inputs)
    with torch.enable_grad():
        logits = model.run_with_hooks(inputs, fwd_hooks=[(name, soften(fn)) for name, fn in hooks], logits_at="last")
        (gradient,) = torch.autograd.grad(probe.metric(logits[:, 0]).sum(), kept)
    return gradient.double().cpu().numpy()
