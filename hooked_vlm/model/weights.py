"""Weights of the text decoder in TransformerLens' names and shapes.

Those of a block (`model.blocks[3].attn.W_O`) are views: an edit in place edits the model. Those of the model
(`model.W_O`, [layer, ...]) are stacked copies. Absent biases read as zeros and refuse edits.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

from hooked_vlm.errors import InputError
from hooked_vlm.nn.components import soft_capped, weight_view
from hooked_vlm.nn.weight_access import AbsentBias, values_of

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM

_ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
_KEY_VALUE = re.compile(r"\.attn\.([Wb]_[KV])$")
_MLP = ("W_in", "W_gate", "W_out", "b_in", "b_out")


class stacked_view(weight_view):
    """A weight of every block, stacked; a copy."""

    def __init__(self, part: str, name: str) -> None:
        def stacked(model: "HookedVLM") -> Tensor:
            return torch.stack([getattr(getattr(block, part), name).to(model.cfg.device) for block in model.blocks])

        super().__init__(stacked)
        self.part, self.name = part, name

    def __set__(self, model: "HookedVLM", value: Any) -> None:
        raise AttributeError(
            f"model.{self.name} is a stacked copy: edit model.blocks[layer].{self.part}.{self.name}, a view"
        )


@weight_view
def W_E(model: "HookedVLM") -> Float[Tensor, "d_vocab d_model"]:
    """A view. In a tied model it shares its memory with `W_U`."""
    return values_of(model.embed)


@weight_view
def W_U(model: "HookedVLM") -> Float[Tensor, "d_model d_vocab"]:
    """A view. In a tied model it shares its memory with `W_E`."""
    return values_of(model.unembed).T


@weight_view
def b_U(model: "HookedVLM") -> Float[Tensor, "d_vocab"]:
    values_of(model.unembed)  # which refuses another module in its place
    return model.unembed.b_U


@dataclass(frozen=True)
class Readout:
    """What follows the unembedding's matrix, as TransformerLens' readouts ask for it (`model.adapter`)."""

    soft_cap: float | None

    def apply_output_logits_transform(self, logits: Float[Tensor, "*dims d_vocab"]) -> Float[Tensor, "*dims d_vocab"]:
        return soft_capped(logits, self.soft_cap)


def adapter(model: "HookedVLM") -> Readout:
    """The soft cap of the logits, for readouts that multiply by `W_U` themselves."""
    return Readout(model.cfg.output_logits_soft_cap)


def OV(model: "HookedVLM") -> FactoredMatrix:
    """`W_V` @ `W_O` of every head, [layer, head, d_model, d_model], key-value heads repeated for their queries."""
    return FactoredMatrix(_for_query_heads(model, model.W_V), model.W_O)


def QK(model: "HookedVLM") -> FactoredMatrix:
    """`W_Q` @ `W_K`ᵀ of every head, [layer, head, d_model, d_model], before rotation."""
    return FactoredMatrix(model.W_Q, _for_query_heads(model, model.W_K).transpose(-2, -1))


def _for_query_heads(
    model: "HookedVLM", matrices: Float[Tensor, "layer kv_head d_model d_head"]
) -> Float[Tensor, "layer head d_model d_head"]:
    return matrices.repeat_interleave(model.cfg.n_heads // model.cfg.n_key_value_heads, dim=1)


def all_head_labels(model: "HookedVLM") -> list[str]:
    """Labels of the heads, layer by layer: "L0H0", "L0H1", ..."""
    return [f"L{layer}H{head}" for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]


def absent_biases(model: "HookedVLM") -> list[str]:
    """Names of the text side's biases that the checkpoint does not have."""
    return [name for name, value in tl_parameters(model).items() if isinstance(value, AbsentBias)]


def tl_parameters(model: "HookedVLM") -> dict[str, Tensor]:
    """The text side's weights under TransformerLens' names, as views; absent biases as closed zeros."""
    named: dict[str, Tensor] = {"embed.W_E": model.W_E}
    for layer, block in enumerate(model.blocks):
        at = f"blocks.{layer}"
        named[f"{at}.ln1.w"], named[f"{at}.ln2.w"] = block.ln1.w, block.ln2.w
        if block.post_norms:
            named[f"{at}.ln1_post.w"], named[f"{at}.ln2_post.w"] = block.ln1_post.w, block.ln2_post.w
        named |= {f"{at}.attn.{name}": getattr(block.attn, name) for name in _ATTENTION}
        named |= {f"{at}.mlp.{name}": getattr(block.mlp, name) for name in _MLP}
    named |= {"ln_final.w": model.ln_final.w, "unembed.W_U": model.W_U, "unembed.b_U": model.b_U}
    return named


def tl_state_dict(model: "HookedVLM") -> dict[str, Tensor]:
    """Copies of the text side's weights under the keys of TransformerLens' `ProcessWeights`.

    Keys and values have their own heads, which that tool asks for by `_W_K`, `_W_V`, `_b_K` and `_b_V`. What comes
    back goes into the model through the views of `tl_parameters`; `hooked_vlm.model.weight_processing` does all of
    it.
    """
    own = {name: value.detach().as_subclass(Tensor).clone() for name, value in tl_parameters(model).items()}
    return {_KEY_VALUE.sub(r".attn._\1", name): value for name, value in own.items()}


def blocks_with(model: "HookedVLM", name: str) -> list[tuple[int, nn.Module]]:
    """(index, block) of every block that has a part called `name`."""
    return [(i, block) for i, block in enumerate(model.blocks) if hasattr(block, name)]


def accumulated_bias(
    model: "HookedVLM", layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
) -> Float[Tensor, "d_model"]:
    """The sum of all biases added to the residual stream before `layer` (and before its MLP).

    Raises:
        InputError: biases in front of a norm, which adds another vector at each position.
    """
    total = torch.zeros(model.cfg.d_model, device=model.cfg.device, dtype=model.cfg.dtype)
    for block in model.blocks[:layer]:
        total = _plus(total, block.attn.output_bias())
        if include_mlp_biases:
            total = _plus(total, block.mlp.output_bias())
    total = _plus(total, model.blocks[layer].attn.output_bias()) if mlp_input else total
    if model.cfg.use_normalization_before_and_after and bool(total.any()):
        raise InputError("the norms behind attention and MLPs make another vector of their biases at each position")
    return total


def tokens_to_residual_directions(model: "HookedVLM", tokens: Any) -> Float[Tensor, "*dims d_model"]:
    """The columns of `W_U` of some tokens (ids, a string or a single id); what raises their logits.

    The final norm's weight is not folded in: `VLMCache.apply_ln_to_stack` applies it.
    """
    if isinstance(tokens, str):
        tokens = model.to_single_token(tokens)
    if isinstance(tokens, int):
        tokens = torch.tensor(tokens)
    tokens = tokens.to(model.W_U.device)
    if tokens.numel() == 1:
        return model.W_U[:, tokens.item()]
    return model.W_U.T[tokens]


def _plus(total: Float[Tensor, "d_model"], bias: Float[Tensor, "d_model"] | None) -> Float[Tensor, "d_model"]:
    return total if bias is None else total + bias.to(total.device)
