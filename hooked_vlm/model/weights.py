"""Weights in TransformerLens' names and shapes, and the switches of optional hook points."""

import re
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import InputError
from hooked_vlm.nn.components import Embed, Norm, Unembed, WithViews, weight_view
from hooked_vlm.nn.weight_access import AbsentBias, values_of

_ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
_KEY_VALUE = re.compile(r"\.attn\.([Wb]_[KV])$")
_MLP = ("W_in", "W_gate", "W_out", "b_in", "b_out")


class stacked_view(weight_view):
    """A weight of every block, stacked; a copy."""

    def __init__(self, part: str, name: str) -> None:
        def stacked(model: Any) -> Tensor:
            return torch.stack([getattr(getattr(block, part), name).to(model.cfg.device) for block in model.blocks])

        super().__init__(stacked)
        self.part, self.name = part, name

    def __set__(self, model: Any, value: Any) -> None:
        raise AttributeError(
            f"model.{self.name} is a stacked copy: edit model.blocks[layer].{self.part}.{self.name}, a view"
        )


class WeightsMixin(WithViews):
    """`W_*` and `b_*` of the text decoder.

    Those of a block (`model.blocks[3].attn.W_O`) are views: an edit in place edits the model. Those of the
    model (`model.W_O`, [layer, ...]) are stacked copies. Absent biases read as zeros and refuse edits.
    """

    cfg: VLMConfig
    embed: Embed
    unembed: Unembed
    ln_final: Norm
    blocks: Any  # a ModuleList of Block
    device_map: dict[str, str]
    to_single_token: Callable[[str], int]

    W_Q, W_K, W_V, W_O = (stacked_view("attn", name) for name in ("W_Q", "W_K", "W_V", "W_O"))
    b_Q, b_K, b_V, b_O = (stacked_view("attn", name) for name in ("b_Q", "b_K", "b_V", "b_O"))
    W_in, W_gate, W_out = (stacked_view("mlp", name) for name in ("W_in", "W_gate", "W_out"))
    b_in, b_out = (stacked_view("mlp", name) for name in ("b_in", "b_out"))

    @weight_view
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """A view. In a tied model it shares its memory with `W_U`."""
        return values_of(self.embed)

    @weight_view
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """A view. In a tied model it shares its memory with `W_E`."""
        return values_of(self.unembed).T

    @weight_view
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        values_of(self.unembed)  # which refuses another module in its place
        return self.unembed.b_U

    @property
    def absent_biases(self) -> list[str]:
        """Names of the text side's biases that the checkpoint does not have."""
        return [name for name, value in self.tl_parameters().items() if isinstance(value, AbsentBias)]

    def tl_parameters(self) -> dict[str, Tensor]:
        """The text side's weights under TransformerLens' names, as views; absent biases as closed zeros."""
        named: dict[str, Tensor] = {"embed.W_E": self.W_E}
        for layer, block in enumerate(self.blocks):
            at = f"blocks.{layer}"
            named[f"{at}.ln1.w"], named[f"{at}.ln2.w"] = block.ln1.w, block.ln2.w
            named |= {f"{at}.attn.{name}": getattr(block.attn, name) for name in _ATTENTION}
            named |= {f"{at}.mlp.{name}": getattr(block.mlp, name) for name in _MLP}
        named |= {"ln_final.w": self.ln_final.w, "unembed.W_U": self.W_U, "unembed.b_U": self.b_U}
        return named

    def tl_state_dict(self) -> dict[str, Tensor]:
        """Copies of the text side's weights under the keys of TransformerLens' `ProcessWeights`.

        Keys and values have their own heads, which that tool asks for by `_W_K`, `_W_V`, `_b_K` and `_b_V`. What comes
        back goes into the model through the views of `tl_parameters`; `hooked_vlm.model.weight_processing` does all of
        it.
        """
        own = {name: value.detach().as_subclass(Tensor).clone() for name, value in self.tl_parameters().items()}
        return {_KEY_VALUE.sub(r".attn._\1", name): value for name, value in own.items()}

    def blocks_with(self, name: str) -> list[tuple[int, nn.Module]]:
        """(index, block) of every block that has a part called `name`."""
        return [(i, block) for i, block in enumerate(self.blocks) if hasattr(block, name)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, "d_model"]:
        """The sum of all biases added to the residual stream before `layer` (and before its MLP)."""
        total = torch.zeros(self.cfg.d_model, device=self.cfg.device, dtype=self.cfg.dtype)
        for block in self.blocks[:layer]:
            total = _plus(total, block.attn.output_bias())
            if include_mlp_biases:
                total = _plus(total, block.mlp.output_bias())
        return _plus(total, self.blocks[layer].attn.output_bias()) if mlp_input else total

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*dims d_model"]:
        """The columns of `W_U` of some tokens (ids, a string or a single id); what raises their logits.

        The final norm's weight is not folded in: `VLMCache.apply_ln_to_stack` applies it.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        if isinstance(tokens, int):
            tokens = torch.tensor(tokens)
        tokens = tokens.to(self.W_U.device)
        if tokens.numel() == 1:
            return self.W_U[:, tokens.item()]
        return self.W_U.T[tokens]

    # ---------------------------------------------------------------- switches

    def set_use_attn_result(self, use: bool) -> None:
        """Compute every head's own output (`attn.hook_result`); costs [pos, head, d_model] memory a layer."""
        self.cfg = self.cfg.with_(use_attn_result=use)

    def set_use_split_qkv_input(self, use: bool) -> None:
        """Give every head its own copies of the residual stream (`hook_q_input`, `hook_k_input`, `hook_v_input`).

        Raises:
            InputError: `use_attn_in` is on.
        """
        self._check_exclusive(use and self.cfg.use_attn_in, "use_split_qkv_input", "use_attn_in")
        self.cfg = self.cfg.with_(use_split_qkv_input=use)

    def set_use_attn_in(self, use: bool) -> None:
        """Give every head its own copy of the residual stream (`hook_attn_in`), from which queries, keys and values are
        made. With grouped queries the key-value heads read the copies of the first heads, as in TransformerLens.

        Raises:
            InputError: `use_split_qkv_input` is on.
        """
        self._check_exclusive(use and self.cfg.use_split_qkv_input, "use_attn_in", "use_split_qkv_input")
        self.cfg = self.cfg.with_(use_attn_in=use)

    @staticmethod
    def _check_exclusive(both: bool, wanted: str, other: str) -> None:
        if both:
            raise InputError(f"{wanted} and {other} exclude each other: call model.set_{other}(False) first")

    def set_use_hook_mlp_in(self, use: bool) -> None:
        """Give the MLP its own copy of the residual stream (`hook_mlp_in`)."""
        self.cfg = self.cfg.with_(use_hook_mlp_in=use)

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        # every move and cast (.to, .cuda, .half, ...) comes through here: cfg follows
        if self.device_map:
            raise InputError("this model is spread over devices and stays so: load it again with what you want instead")
        if self.cfg.quantize is not None:
            raise InputError(f"this model's weights are {self.cfg.quantize}: load it again where and as you want it")
        moved = super()._apply(fn, recurse)
        self.cfg = self.cfg.with_(device=self.embed.weight.device, dtype=self.embed.weight.dtype)
        return moved


def _plus(total: Float[Tensor, "d_model"], bias: Float[Tensor, "d_model"] | None) -> Float[Tensor, "d_model"]:
    return total if bias is None else total + bias.to(total.device)
