"""Weights rewritten without changing what the model computes, in TransformerLens' sense, on RMSNorm decoders.

Published weights are never processed on loading. These functions do it when called, for analyses that read weights
without the norms and biases around them (a head's circuits, the direction of a token):

    fold_ln(model)             # norm weights into the matrices that read behind them
    center_unembed(model)      # the unembedding's columns without their mean; log-probabilities stay
    fold_value_biases(model)   # value biases into one output bias a layer

Each replaces parameters by new ones (a `transformers` model that shared them keeps its own) and is named in
`model.cfg.processed`. `HookedVLM.from_pretrained` gives the published weights back.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.errors import InputError
from hooked_vlm.nn.components import Norm
from hooked_vlm.nn.weight_access import why_closed

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


def fold_ln(model: "HookedVLM") -> None:
    """The weights of the decoder's norms, folded into the matrices that read behind them: W_Q, W_K, W_V, W_in, W_gate
    and W_U. The norms' own weights are then 1. Exact up to rounding.

    `hook_out` is then `hook_normalized`, and `ln_final`'s weight is in `W_U`. A tied model is untied first. Weights
    that are offsets from 1 (Gemma) are then 0. Norms behind attention and MLPs keep theirs: no matrix alone reads them.

    Raises:
        InputError: they are folded already.
    """
    _check_open(model)
    norms = [norm for block in model.blocks for norm in (block.ln1, block.ln2)]
    if all(bool((norm.factor == 1).all()) for norm in (*norms, model.ln_final)):
        raise InputError("all norms multiply by 1: there is nothing to fold (were they folded before?)")
    untie(model)
    for block in model.blocks:
        for linear in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj):
            _set_weight(linear, _folded(linear, block.ln1))
        for linear in (block.mlp.in_proj, block.mlp.gate_proj):
            if linear is not None:
                _set_weight(linear, _folded(linear, block.ln2))
    _set_weight(model.unembed, _folded(model.unembed, model.ln_final))
    for norm in (*norms, model.ln_final):
        _set_weight(norm, torch.full_like(norm.weight, 0.0 if norm.offset else 1.0))
    _note(model, "fold_ln")


def center_unembed(model: "HookedVLM") -> None:
    """`W_U` without the mean of its columns over the vocabulary. Every logit of a position falls by the same number,
    so that log-probabilities and differences of logits stay. A tied model is untied first.

    Raises:
        InputError: it is centred already, or a soft cap stands behind it, under which logits would fall unevenly.
    """
    _check_open(model)
    if (cap := model.cfg.output_logits_soft_cap) is not None:
        raise InputError(f"the logits have a soft cap of {cap}: centring W_U would change log-probabilities")
    weight = model.unembed.weight.detach()
    mean = weight.mean(0, keepdim=True, dtype=torch.promote_types(weight.dtype, torch.float32))
    if float(mean.abs().max()) <= torch.finfo(weight.dtype).eps * float(weight.abs().max()):
        raise InputError(
            "the mean of W_U over the vocabulary is 0: there is nothing to centre (was it centred before?)"
        )
    untie(model)
    _set_weight(model.unembed, (weight - mean).to(weight.dtype))
    _note(model, "center_unembed")


def fold_value_biases(model: "HookedVLM") -> None:
    """Value biases folded into the output bias of their layer: b_O = sum over query heads of b_V W_O, b_V = 0. Exact up
    to rounding, because every pattern sums to 1.

    Where an intervention makes patterns that do not (a query that attends to nothing), or silences a head's z, the
    folded bias stays: such experiments mean something else afterwards. The checkpoint layouts have no such bias, so
    that the model can no longer be saved.

    Raises:
        InputError: no layer has a value bias, or all are 0.
    """
    _check_open(model)
    biases = [block.attn.v_proj.bias for block in model.blocks]
    if all(bias is None or not bias.any() for bias in biases):
        why = "this model has none" if biases[0] is None else "all are 0 (were they folded before?)"
        raise InputError(f"there are no value biases to fold: {why}")
    for block in model.blocks:
        attn = block.attn
        if attn.v_proj.bias is None:
            continue
        b_V = attn.b_V.repeat_interleave(attn.n_heads // attn.n_key_value_heads, dim=0)
        folded = torch.einsum("hd,hdm->m", b_V, attn.W_O)
        if attn.o_proj.bias is not None:
            folded = folded + attn.o_proj.bias
        attn.o_proj.bias = _parameter(folded, attn.o_proj.weight)
        attn.v_proj.bias = _parameter(torch.zeros_like(attn.v_proj.bias), attn.v_proj.weight)
    _note(model, "fold_value_biases")


def _folded(linear: nn.Linear, norm: Norm) -> Float[Tensor, "d_out d_model"]:
    return (linear.weight * norm.factor).to(linear.weight.dtype)


def untie(model: "HookedVLM") -> None:
    """Give the unembedding a matrix of its own where it shares the embedding's; otherwise nothing to do."""
    if model.unembed.weight is model.embed.weight:
        _set_weight(model.unembed, model.unembed.weight.clone())
        model.cfg = model.cfg.with_(tie_word_embeddings=False)


def _check_open(model: "HookedVLM") -> None:
    if why := why_closed(model):
        raise InputError(f"the weights of this model cannot be rewritten: {why}")


def _set_weight(module: nn.Module, weight: Float[Tensor, "..."]) -> None:
    module.weight = _parameter(weight, module.weight)  # pyright: ignore[reportArgumentType]


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=like.requires_grad)


def _note(model: "HookedVLM", what: str) -> None:
    model.cfg = model.cfg.with_(processed=(*model.cfg.processed, what))
