"""`DecomposingCache`: TransformerLens' decompositions of the residual stream, for models whose norms are not folded."""

from copy import copy
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice, SliceInput

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.model.cut import at_real_positions
from hooked_vlm.model.deriving import DerivingCache
from hooked_vlm.nn.hooks import deepstack_points


class DecomposingCache(DerivingCache):
    """The text side of a cache, taken apart.

    `apply_ln` applies norms whole, weight included, so that decompositions rebuild the logits of a model whose
    norm weights are not folded.
    """

    inputs: VLMInputs | None
    """Inputs of the run; None where they are not known."""

    # ---------------------------------------------------------------- TransformerLens' decompositions

    accumulated_resid = at_real_positions(ActivationCache.accumulated_resid)
    stack_neuron_results = at_real_positions(ActivationCache.stack_neuron_results)
    logit_attrs = at_real_positions(ActivationCache.logit_attrs)

    @at_real_positions
    def stack_head_results(
        self,
        layer: int = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Slice | SliceInput = None,
        apply_ln: bool = False,
    ) -> Any:
        """TransformerLens' stack: what each head adds to the stream (`Block.head_outputs`)."""
        self._ensure_head_results()
        added = copy(self)
        for own, block in enumerate(self.model.blocks):
            if block.post_norms:
                name, scale = f"blocks.{own}.attn.hook_result", self._post_scale(own, "ln1_post")
                added.cache_dict[name] = block.ln1_post.frozen(self[name], scale[..., None, :])
        return super(DecomposingCache, added).stack_head_results(
            layer, return_labels, incl_remainder, pos_slice, apply_ln
        )

    @at_real_positions
    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Slice | SliceInput = None,
        pos_slice: Slice | SliceInput = None,
        project_output_onto: Tensor | None = None,
    ) -> Tensor:
        """TransformerLens' results: what each neuron adds to the stream. The denominator of a norm behind the MLP is
        that of the run."""
        block = self.model.blocks[layer]
        if not block.post_norms:
            return super().get_neuron_results(layer, neuron_slice, pos_slice, project_output_onto)
        at = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        scale = at.apply(self._post_scale(layer, "ln2_post")[..., 0], dim=-1)  # [...]
        onto, factor = project_output_onto, block.ln2_post.factor
        if onto is not None:
            factor = factor.to(onto.device) if onto.ndim == 1 else factor[:, None].to(onto.device)
            onto = (factor * onto).to(onto.dtype)
        results = super().get_neuron_results(layer, neuron_slice, at, onto)  # [..., neuron, d_model or direction]
        scale = scale[(..., *[None] * (results.ndim - scale.ndim))].to(results.device)
        return (results / scale * (factor.to(results.device) if onto is None else 1)).to(results.dtype)

    def _post_scale(self, layer: int, norm: str) -> Float[Tensor, "*batch pos 1"]:
        """The denominator of a norm behind attention or MLP.

        Raises:
            InputError: it is not in this cache.
        """
        name = f"blocks.{layer}.{norm}.hook_scale"
        if name not in self.cache_dict:
            raise InputError(
                f"this cache holds no {name}, which it takes to tell apart what heads or neurons add to the stream "
                "behind a norm: name it in names_filter"
            )
        return self.cache_dict[name]

    @at_real_positions
    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """TransformerLens' decomposition; with `incl_embeds` image features that enter behind blocks (DeepStack) are
        parts, too, labelled "0_deepstack"."""
        parts, labels = super().decompose_resid(layer, mlp_input, mode, apply_ln, pos_slice, incl_embeds, True)
        if incl_embeds:
            entering, names = self._deepstack(layer, mlp_input, apply_ln, pos_slice)
            parts, labels = torch.cat((parts, *entering)), [*labels, *names]
        return (parts, labels) if return_labels else parts

    @at_real_positions
    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Any:
        """TransformerLens' decomposition, and image features that enter behind blocks (DeepStack) as parts."""
        parts, labels = super().get_full_resid_decomposition(
            layer, mlp_input, expand_neurons, apply_ln, pos_slice, True, project_output_onto
        )
        entering, names = self._deepstack(layer, mlp_input, apply_ln, pos_slice)
        if project_output_onto is not None:
            entering = [part @ project_output_onto for part in entering]
        parts, labels = torch.cat((parts, *entering)), [*labels, *names]
        return (parts, labels) if return_labels else parts

    def _deepstack(
        self, layer: int | None, mlp_input: bool, apply_ln: bool, pos_slice: Slice | SliceInput
    ) -> tuple[list[Float[Tensor, "1 *batch_and_pos d_model"]], list[str]]:
        """What enters the stream behind the blocks before `layer`, and its labels.

        Raises:
            InputError: it is not known whether there were images.
        """
        cfg = self.model.cfg
        until = cfg.n_layers if layer in (None, -1) else layer
        names = deepstack_points(min(cfg.n_deepstack, until))
        if not names or (self.inputs is not None and not self.inputs.has_visuals):
            return [], []
        if self.inputs is None and names[0] not in self.cache_dict:
            raise InputError(
                f"this cache holds no {names[0]} and does not know whether its run had images: set cache.inputs to the "
                "inputs of the run"
            )
        at = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        parts = [at.apply(self[name], dim=-2)[None] for name in names]
        if apply_ln:
            parts = [self.apply_ln_to_stack(part, until, pos_slice=at, mlp_input=mlp_input) for part in parts]
        return parts, [f"{block}_deepstack" for block in range(len(parts))]

    # ---------------------------------------------------------------- norms, weight included

    @at_real_positions
    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Slice | SliceInput = None,
        batch_slice: Slice | SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """Apply the final norm as TransformerLens does, then its learned weight (which must be folded there)."""
        out = super().apply_ln_to_stack(
            residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln
        )
        is_final = layer is None or layer == -1 or layer == self.model.cfg.n_layers
        if recompute_ln and is_final:  # the parent called ln_final itself, weight and all
            return out
        return (out * self._norm_factor(layer, mlp_input)).to(out.dtype)

    def _ensure_head_results(self) -> bool:
        # the parent multiplies by W_O where it lies, which need not be here, and may be no plain matrix
        for layer, block in enumerate(self.model.blocks):
            result, z = f"blocks.{layer}.attn.hook_result", f"blocks.{layer}.attn.hook_z"
            if result not in self.cache_dict and z in self.cache_dict:
                self.cache_dict[result] = block.attn.head_results(self.cache_dict[z])
        return super()._ensure_head_results()

    def _stack_neuron_results_apply_ln_projected(
        self, layer: int, pos_slice: Slice, neuron_slice: Slice, project_2d: Tensor, mlp_input: bool = False
    ) -> Tensor:
        # the parent divides by the scale within the projection, so the weight goes into the projection
        project_2d = project_2d * self._norm_factor(layer, mlp_input)[:, None]
        if layer and self.model.cfg.use_normalization_before_and_after:
            scale = self._get_cached_ln_scale(layer, mlp_input=mlp_input, pos_slice=pos_slice)[..., None]
            parts = [self.get_neuron_results(own, neuron_slice, pos_slice, project_2d) for own in range(layer)]
            return torch.cat([part / scale for part in parts], dim=-2).movedim(-2, 0)
        return super()._stack_neuron_results_apply_ln_projected(
            layer, pos_slice, neuron_slice, project_2d, mlp_input=mlp_input
        )

    def _norm_factor(self, layer: int | None, mlp_input: bool) -> Tensor:
        if layer is None or layer == -1 or layer == self.model.cfg.n_layers:
            return self.model.ln_final.factor
        block = self.model.blocks[layer]
        return (block.ln2 if mlp_input else block.ln1).factor.to(self.model.cfg.device)
