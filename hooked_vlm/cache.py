"""`VLMCache`: TransformerLens' `ActivationCache` for models with images and unfolded norms."""

from typing import Any

import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice, SliceInput, get_act_name

from hooked_vlm.attention import AttentionMask, attention_scores
from hooked_vlm.hooks import is_vision, nearest_names


class VLMCache(ActivationCache):
    """Activations of one run, by hook name or TransformerLens' shorthand (`cache["pattern", 3]`).

    It differs from its parent in three ways:

    - `cache["pattern", l]` and `cache["attn_scores", l]` need not be stored: they are derived from the
      cached rotated queries and keys. They are stored where that layer ran explicitly (its scores or
      pattern had a hook) or were named in `names_filter`.
    - Image-side activations (batch axis: images) live in `cache.vision`; position slicing and batch
      removal leave them alone. They are also found here under their full hook names.
    - `apply_ln` applies norms whole, weight included, so that decompositions rebuild the logits of a
      model whose norm weights are not folded.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Any,
        has_batch_dim: bool = True,
        attention_mask: AttentionMask | None = None,
        queries_cut: bool = False,
    ) -> None:
        vision = {name: value for name, value in cache_dict.items() if is_vision(name.removesuffix("_grad"))}
        super().__init__({k: v for k, v in cache_dict.items() if k not in vision}, model, has_batch_dim)
        self.vision = ActivationCache({k.removeprefix("vision."): v for k, v in vision.items()}, model)
        """Image-side activations without their `vision.` prefix: `cache.vision["blocks.0.hook_resid_pre"]`."""
        self._vision_by_full_name = vision
        self._mask = attention_mask
        self._queries_cut = queries_cut

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, str) and key in self._vision_by_full_name:
            return self._vision_by_full_name[key]
        name = self._full_name(key)
        if name in self.cache_dict:
            return self.cache_dict[name]
        if name.endswith(("attn.hook_pattern", "attn.hook_attn_scores")):
            return self._derive(name)
        known = [*self.cache_dict, *self._vision_by_full_name]
        raise KeyError(f"{name!r} is not in this cache.{nearest_names(name, known)}")

    def __contains__(self, key: Any) -> bool:
        return key in self.cache_dict or key in self._vision_by_full_name

    def _full_name(self, key: Any) -> str:
        if isinstance(key, str):
            return key if key in self.cache_dict else get_act_name(key)
        if len(key) > 1 and isinstance(key[1], int) and key[1] < 0:
            key = (key[0], self.model.cfg.n_layers + key[1], *key[2:])
        return get_act_name(*key)

    def _derive(self, name: str) -> Tensor:
        """The scores or pattern of a layer, from its rotated queries and keys."""
        prefix = name.rsplit(".", 1)[0]
        needed = [f"{prefix}.hook_rot_q", f"{prefix}.hook_rot_k"]
        if any(n not in self.cache_dict for n in needed) or self._mask is None:
            raise KeyError(
                f"{name!r} is neither stored nor derivable: cache {needed[0]!r} and {needed[1]!r} with it, "
                "or name it in names_filter to have it computed in the run"
            )
        if self._queries_cut:
            raise KeyError(
                f"{name!r} cannot be derived from a cache cut by pos_slice (it needs every key): "
                "name it in names_filter to have it computed in the run"
            )
        q, k = (self.cache_dict[n] for n in needed)
        if not self.has_batch_dim:
            q, k = q[None], k[None]
        if q.shape[1] != k.shape[1]:
            raise KeyError(f"{name!r} cannot be derived from a run that continued a key-value cache")
        allowed = self._mask.dense(q.shape[1], k.shape[1], q.device)
        scores = attention_scores(q, k).masked_fill(~allowed, -torch.inf)
        if name.endswith("hook_attn_scores"):
            return scores if self.has_batch_dim else scores[0]
        pattern = scores.softmax(-1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype)
        valid = self._mask.query_valid(q.shape[1])
        if valid is not None:
            pattern = pattern.masked_fill(~valid.to(q.device)[:, None, :, None], 0.0)
        return pattern if self.has_batch_dim else pattern[0]

    def to(self, device: str | torch.device) -> "VLMCache":
        super().to(device)
        self.vision.to(device)
        self._vision_by_full_name = {k: v.to(device) for k, v in self._vision_by_full_name.items()}
        if self._mask is not None:
            self._mask = self._mask.to(torch.device(device))
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Slice | SliceInput) -> "VLMCache":
        """The text side cut to some rows. `cache.vision` keeps all images; derived patterns follow the rows."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        chosen = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        mask = None if self._mask is None else self._mask.rows(chosen)
        out = VLMCache(sliced.cache_dict, self.model, sliced.has_batch_dim, mask, self._queries_cut)
        out.vision, out._vision_by_full_name = self.vision, self._vision_by_full_name
        return out

    # ---------------------------------------------------------------- norms, weight included

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
        """As in TransformerLens, then multiplied by the norm's learned weight (which there must be folded)."""
        out = super().apply_ln_to_stack(
            residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln
        )
        is_final = layer is None or layer == -1 or layer == self.model.cfg.n_layers
        if recompute_ln and is_final:  # the parent called ln_final itself, weight and all
            return out
        return out * self._norm_weight(layer, mlp_input)

    def _stack_neuron_results_apply_ln_projected(
        self, layer: int, pos_slice: Slice, neuron_slice: Slice, project_2d: Tensor, mlp_input: bool = False
    ) -> Tensor:
        # the parent divides by the scale within the projection, so the weight goes into the projection
        project_2d = project_2d * self._norm_weight(layer, mlp_input)[:, None]
        return super()._stack_neuron_results_apply_ln_projected(
            layer, pos_slice, neuron_slice, project_2d, mlp_input=mlp_input
        )

    def _norm_weight(self, layer: int | None, mlp_input: bool) -> Tensor:
        if layer is None or layer == -1 or layer == self.model.cfg.n_layers:
            return self.model.ln_final.weight
        block = self.model.blocks[layer]
        return (block.ln2 if mlp_input else block.ln1).weight
