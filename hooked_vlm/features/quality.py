"""How well a dictionary stands for the stream it reads: sparsity, error, and the loss of a model that runs on it."""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.errors import InputError
from hooked_vlm.features.dictionary import FeatureDictionary, check_fits
from hooked_vlm.features.vectors import dictionary_hooks, real_vectors
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.interventions.base import Hooks, position_table
from hooked_vlm.model.losses import predicted_text
from hooked_vlm.nn.forward_pass import block_spans
from hooked_vlm.nn.hooks import HookPoint, is_vision

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

REPLACED = ("reconstruction", "zero", "mean")
"""What stands in a group's place when the loss is taken."""

Masks = dict[str, Bool[Tensor, "row column"]]


@torch.no_grad()
def reconstruction_quality(
    model: "HookedVLM", inputs: Iterable[VLMInputs], dictionary: FeatureDictionary, *, loss: bool = True
) -> pd.DataFrame:
    """Measure a dictionary on inputs, over all tokens and, on the text side, over image and text tokens apart.

    Sums are float64. The inputs are run once, and for the loss three times more for each group.

    Args:
        inputs: batches; those of prompts alone do where a model is causal, others need an answer (`inputs.append`).
        loss: False leaves out the columns of the loss.

    Returns:
        One row for each group ("all", "image" with videos, "text") that has tokens:

        - `tokens`, their number;
        - `L0`, the mean number of active features;
        - `dead`, the share of features that are active at none of these tokens;
        - `explained variance`, 1 - Σ|x - x̂|² / Σ|x - mean|², the mean being the group's;
        - `mean squared error`, for each entry of a vector; `cosine`, the mean over tokens between x and x̂;
        - `loss`, the mean next-token loss over text in nats; `loss with reconstruction`, `with zero`, `with mean` when
          these stand in the place of the group's vectors;
        - `loss recovered`, (zero - reconstruction) / (zero - plain), and `loss recovered from mean`, the same with the
          group's mean in the place of zero.

        x is what a transcoder should write, x̂ what it writes.

    Raises:
        InputError: no inputs, or no text to predict in them.
        FeatureError: the dictionary does not fit the model.
    """
    check_fits(dictionary, model)
    batches = [model.as_inputs(batch) for batch in inputs]
    if not batches:
        raise InputError("no inputs: give batches of them, [model.to_inputs(...)]")
    groups: dict[str, _Group] = defaultdict(partial(_Group, dictionary))
    losses: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    for batch in batches:
        masks = token_groups(model, dictionary.out_hook_name, batch)
        hooks = dictionary_hooks(dictionary, partial(_count, dictionary, groups, masks))
        losses["", "plain"].append(_loss(model, batch, hooks, loss))
    means = {name: group.mean for name, group in groups.items()}
    for batch in batches if loss else ():
        masks = token_groups(model, dictionary.out_hook_name, batch)
        for name in groups:
            for kind in REPLACED:
                write = partial(_replace, dictionary, masks[name], kind, means[name])
                losses[name, kind].append(_loss(model, batch, dictionary_hooks(dictionary, write), loss))
    rows = {name: {**group.row(), **(_loss_columns(losses, name) if loss else {})} for name, group in groups.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("group")


def token_groups(model: "HookedVLM", name: str, inputs: VLMInputs) -> Masks:
    """Vectors of a hook point by group, without padding; image and text apart on the text side alone."""
    real = real_vectors(model, name, inputs)
    if is_vision(name):
        return {"all": real}
    text = position_table("text", inputs)[:, :-1]
    return {"all": real, "image": real & ~text, "text": text}


class _Group:
    """Sums over the vectors of a group, in float64; mean and spread as Chan et al. (1983) join those of parts."""

    def __init__(self, dictionary: FeatureDictionary) -> None:
        self.n, self.width = 0, dictionary.d_out
        self.mean = torch.zeros(dictionary.d_out, dtype=torch.float64)
        self.spread = self.error = self.cosine = self.active = 0.0
        self.fired = torch.zeros(dictionary.n_features, dtype=torch.bool)

    def add(
        self, x: Float[Tensor, "at d"], reconstruction: Float[Tensor, "at d"], features: Float[Tensor, "at feature"]
    ) -> None:
        """Count vectors, their reconstructions and features."""
        x, reconstruction = x.double(), reconstruction.double()
        n, mean = len(x), x.mean(0)
        step = mean.cpu() - self.mean
        self.spread += (x - mean).square().sum().item()
        self.spread += step.square().sum().item() * self.n * n / (self.n + n)
        self.mean += step * n / (self.n + n)
        self.n += n
        self.error += (x - reconstruction).square().sum().item()
        self.cosine += torch.cosine_similarity(x, reconstruction, dim=-1).sum().item()
        self.active += (features != 0).sum().item()
        self.fired |= (features != 0).any(0).cpu()

    def row(self) -> dict[str, int | float]:
        """The columns that need no loss."""
        return {
            "tokens": self.n,
            "L0": self.active / self.n,
            "dead": 1 - self.fired.double().mean().item(),
            "explained variance": 1 - self.error / self.spread if self.spread else np.nan,
            "mean squared error": self.error / (self.n * self.width),
            "cosine": self.cosine / self.n,
        }


def _count(
    dictionary: FeatureDictionary,
    groups: dict[str, _Group],
    masks: Masks,
    x: Tensor,
    out: Tensor,
    hook: HookPoint,
) -> None:
    features = dictionary.encode(x)
    reconstruction = dictionary.decode(features, x).to(out.device)
    for name, mask in masks.items():
        if mask.any():
            here = mask.view(out.shape[:-1]).to(out.device)
            groups[name].add(out[here], reconstruction[here], features[here.to(features.device)])


def _replace(
    dictionary: FeatureDictionary, mask: Tensor, kind: str, mean: Tensor, x: Tensor, out: Tensor, hook: HookPoint
) -> Tensor:
    if kind == "reconstruction":
        new = dictionary.decode(dictionary.encode(x), x).to(out)
    else:
        new = (mean if kind == "mean" else torch.zeros_like(mean)).to(out)
    return torch.where(mask.view(out.shape[:-1]).to(out.device)[..., None], new, out)


# ---------------------------------------------------------------- the loss


def _loss(model: "HookedVLM", inputs: VLMInputs, hooks: Hooks, wanted: bool) -> tuple[float, int]:
    """Sum of the next-token losses over text, in float64, and their number. Tokens that see their own target, as all of
    a prompt do in some families, are left out."""
    logits = model.run_with_hooks(inputs, fwd_hooks=hooks, return_type="logits" if wanted else None)
    if not wanted:
        return 0.0, 0
    counted = predicted_text(inputs)
    for row, start, stop in block_spans(model.cfg, inputs):
        counted[row, start : stop - 1] = False
    predictions, targets = logits[:, :-1][counted.to(logits.device)], inputs.tokens[:, 1:][counted]
    each = -predictions.double().log_softmax(-1).gather(-1, targets.to(logits.device)[:, None])
    return each.sum().item(), int(counted.sum())


def _loss_columns(losses: dict[tuple[str, str], list[tuple[float, int]]], group: str) -> dict[str, float]:
    plain, with_reconstruction, with_zero, with_mean = (
        _mean_loss(losses[key]) for key in (("", "plain"), *((group, kind) for kind in REPLACED))
    )
    return {
        "loss": plain,
        "loss with reconstruction": with_reconstruction,
        "loss with zero": with_zero,
        "loss with mean": with_mean,
        "loss recovered": _recovered(with_zero, with_reconstruction, plain),
        "loss recovered from mean": _recovered(with_mean, with_reconstruction, plain),
    }


def _mean_loss(parts: list[tuple[float, int]]) -> float:
    n = sum(count for _, count in parts)
    if not n:
        raise InputError(
            "there is no text to predict in these inputs, where tokens do not see their target: append an answer "
            "(inputs.append), or leave the loss out (loss=False)"
        )
    return sum(total for total, _ in parts) / n


def _recovered(without: float, with_reconstruction: float, plain: float) -> float:
    return (without - with_reconstruction) / (without - plain) if without != plain else np.nan
