"""`VLMCache`: TransformerLens' `ActivationCache` for models with images and unfolded norms."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice, SliceInput, get_act_name

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.attention import attention_pattern, masked_scores
from hooked_vlm.nn.hooks import canonical, is_vision, nearest_names
from hooked_vlm.nn.masks import AttentionMask

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


class DerivingCache(ActivationCache):
    """An `ActivationCache` that need not hold scores and patterns.

    `cache["pattern", l]` and `cache["attn_scores", l]` are derived from the cached queries and keys (rotated ones where
    positions are `rotary`) unless they were stored: where the layer ran explicitly because its scores or pattern had a
    hook, or where they were named in `names_filter`.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: "HookedVLM",
        has_batch_dim: bool,
        n_layers: int,
        attention_mask: AttentionMask | None,
        why_not: str = "",
        rotary: bool = True,
        within: str = "",
    ) -> None:
        """`within` is what the names of these activations begin with in the model."""
        super().__init__(cache_dict, model, has_batch_dim)
        self._within, self._points = within, model.hook_dict
        self.exchanged: frozenset[str] = frozenset()
        """Attention modules in which another module stands in the place of scores or pattern: nothing is derived."""
        self._n_layers = n_layers
        self._mask = attention_mask
        self._why_not = why_not
        """Why patterns cannot be derived in this cache; empty if they can."""
        self._rotary = rotary

    def __getitem__(self, key: Any) -> Tensor:
        name = self._full_name(key)
        if name in self.cache_dict:
            return self.cache_dict[name]
        if name.endswith(("attn.hook_pattern", "attn.hook_attn_scores")):
            return self._derive(name)
        raise KeyError(f"{name!r} is not in this cache.{nearest_names(name, self._known())}")

    def _known(self) -> Iterable[str]:
        return self.cache_dict

    def _full_name(self, key: Any) -> str:
        if isinstance(key, str):
            return key if key in self.cache_dict else self._own_name(get_act_name(key))
        if len(key) > 1 and isinstance(key[1], int) and key[1] < 0:
            key = (key[0], self._n_layers + key[1], *key[2:])
        return self._own_name(get_act_name(*key))

    def _own_name(self, name: str) -> str:
        return canonical(f"{self._within}{name}", self._points).removeprefix(self._within)

    def _derive(self, name: str, query: int | None = None) -> Tensor:
        """The scores or pattern of a layer from its queries and keys, of all queries or of one."""
        prefix = name.rsplit(".", 1)[0]
        needed = [self._compared(prefix, side) for side in "qk"]
        why_not = self._why_not
        if any(n not in self.cache_dict for n in needed) or self._mask is None:
            why_not = why_not or f"{needed[0]} and {needed[1]} are not in this cache"
        if f"{self._within}{prefix}" in self.exchanged:
            why_not = "another module stands in the place of its hook point"
        if why_not or self._mask is None:
            raise KeyError(
                f"{name!r} was not stored and cannot be derived ({why_not}): name it in names_filter to have "
                "it computed in the run"
            )
        q, k = (self.cache_dict[n] if self.has_batch_dim else self.cache_dict[n][None] for n in needed)
        mask = self._mask.to(q.device)
        valid = mask.query_valid(q.shape[1])
        queries = torch.arange(q.shape[1], device=q.device)
        if query is not None:
            q, queries = q[:, [query]], queries[[query]]
            valid = None if valid is None else valid[:, [query]]
        scores = masked_scores(q, k, mask, queries[None])
        if name.endswith("hook_attn_scores"):
            return scores if self.has_batch_dim else scores[0]
        pattern = attention_pattern(scores, valid)
        return pattern if self.has_batch_dim else pattern[0]

    def _compared(self, prefix: str, side: str) -> str:
        """The hook point of the queries or keys that scores are made of: rotated, or normed, where they are."""
        if self._rotary:
            return f"{prefix}.hook_rot_{side}"
        normed = f"{prefix}.hook_{side}_normed"
        return normed if f"{self._within}{normed}" in self._points else f"{prefix}.hook_{side}"

    def to(self, target: str | torch.device | torch.dtype) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """On another device, or in another dtype (truth values and whole numbers keep theirs)."""
        if isinstance(target, torch.dtype):
            kept = {name: x.to(target) if x.is_floating_point() else x for name, x in self.cache_dict.items()}
            self.cache_dict = kept
            return self
        super().to(target)
        if self._mask is not None:
            self._mask = self._mask.to(torch.device(target))
        return self


class VLMCache(DerivingCache):
    """Activations of one run, by hook name or TransformerLens' shorthand (`cache["pattern", 3]`).

    Image-side activations (batch axis: images) live in `cache.vision`, under their names without `vision.`:
    `cache.vision["resid_post", 1]`. Position slicing and batch removal leave them alone. They are also found
    here under their full hook names.

    `apply_ln` applies norms whole, weight included, so that decompositions rebuild the logits of a model whose
    norm weights are not folded.
    """

    model: "HookedVLM"  # pyright: ignore[reportIncompatibleVariableOverride] (narrower than TransformerLens')

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: "HookedVLM",
        has_batch_dim: bool = True,
        attention_mask: AttentionMask | None = None,
        vision_mask: AttentionMask | None = None,
        why_not: str = "",
        inputs: VLMInputs | None = None,
    ) -> None:
        self.inputs = inputs
        """Inputs of the run; None where the cache was cut to some rows."""
        vision = {name: value for name, value in cache_dict.items() if is_vision(name)}
        text = {name: value for name, value in cache_dict.items() if name not in vision}
        super().__init__(text, model, has_batch_dim, model.cfg.n_layers, attention_mask, why_not)
        tower = model.cfg.vision
        n_layers, rotary = (0, True) if tower is None else (tower.n_layers, tower.rope_theta is not None)
        stripped = {name.removeprefix("vision."): value for name, value in vision.items()}
        self.vision = DerivingCache(stripped, model, True, n_layers, vision_mask, rotary=rotary, within="vision.")
        """The image side: [image, patch, ...], images padded at the end to the longest."""

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, str) and is_vision(key):
            return self.vision[key.removeprefix("vision.")]
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        key = self._own_name(key) if isinstance(key, str) else key
        if isinstance(key, str) and is_vision(key):
            return key.removeprefix("vision.") in self.vision.cache_dict
        return key in self.cache_dict

    def follow(self, name: str, tensor: Tensor) -> None:
        """Take an activation of a later pass in place of the first one's."""
        cache = self.vision if is_vision(name) else self
        cache.cache_dict[name.removeprefix("vision.")] = tensor
        self._why_not = self.vision._why_not = "later passes have written into this cache"

    def _known(self) -> Iterable[str]:
        vision = self.vision.cache_dict
        return [*self.cache_dict, *(n if is_vision(n) else f"vision.{n}" for n in vision)]

    def to(self, target: str | torch.device | torch.dtype) -> "VLMCache":
        super().to(target)
        self.vision.to(target)
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Slice | SliceInput) -> "VLMCache":
        """The text side cut to some rows, `cache.vision` whole. Patterns must be read before, or stored."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        why_not = "the cache was cut to some rows"
        out = VLMCache(sliced.cache_dict, self.model, sliced.has_batch_dim, None, None, why_not)
        out.vision = self.vision
        return out

    def on_image(
        self,
        layer: int,
        head: int | None = None,
        query: int = -1,
        image: int = 0,
        part: Literal["tiles", "thumbnail"] = "tiles",
    ) -> Float[Tensor, "rows cols"] | Float[Tensor, "head rows cols"]:
        """The attention of one query to the tokens of an image, laid out as the picture: [row, column] of tokens.

        A tiled image's tiles are put together to one picture; its thumbnail's tokens are a picture of their own.
        The two share the query's attention, and neither sums to 1, for text draws its part.
        `hooked_vlm.analysis.pictures.overlay` lays the result over the image.

        Args:
            head: None for all heads, [head, row, column].
            query: a column of the inputs; negative ones count from the end of the image's row.
            part: of a tiled image, "tiles" or "thumbnail".

        Raises:
            InputError: there is no such image, query or head, or the rows of the cache were cut.
            GeometryError: a thumbnail is asked for where there is none.
            KeyError: the pattern was not stored and cannot be derived.
        """
        inputs = self.inputs
        if inputs is None:
            raise InputError("this cache was cut to some rows and no longer knows its images: ask before cutting")
        row, tokens = inputs.row_of_image(image), inputs.image_tokens(image)
        first, stop = inputs.first[row], inputs.stop[row]
        at = stop + query if query < 0 else query
        if not first <= at < stop:
            raise InputError(f"there is no query {query} in row {row}, whose tokens lie at {first} to {stop - 1}")
        n_heads = self.model.cfg.n_heads
        if head is not None and not 0 <= head < n_heads:
            raise InputError(f"there is no head {head}: the model has heads 0 to {n_heads - 1}")
        name = self._full_name(("pattern", layer))
        if name in self.cache_dict:
            pattern = self.cache_dict[name] if self.has_batch_dim else self.cache_dict[name][None]
            if pattern.shape[2] != inputs.shape[1]:
                raise InputError(f"{name} was stored for {pattern.shape[2]} queries only: cache it without pos_slice")
            attention = pattern[row, :, at]
        else:
            attention = self._derive(name, at)
            attention = (attention[row] if self.has_batch_dim else attention)[:, 0]
        chosen = attention[:, tokens.to(attention.device)]
        laid_out = torch.from_numpy(np.ascontiguousarray(inputs.on_image(image, chosen, part)))
        return laid_out if head is None else laid_out[head]

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
        """Apply the final norm as TransformerLens does, then its learned weight (which must be folded there)."""
        out = super().apply_ln_to_stack(
            residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln
        )
        is_final = layer is None or layer == -1 or layer == self.model.cfg.n_layers
        if recompute_ln and is_final:  # the parent called ln_final itself, weight and all
            return out
        return out * self._norm_weight(layer, mlp_input)

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
        project_2d = project_2d * self._norm_weight(layer, mlp_input)[:, None]
        return super()._stack_neuron_results_apply_ln_projected(
            layer, pos_slice, neuron_slice, project_2d, mlp_input=mlp_input
        )

    def _norm_weight(self, layer: int | None, mlp_input: bool) -> Tensor:
        if layer is None or layer == -1 or layer == self.model.cfg.n_layers:
            return self.model.ln_final.w
        block = self.model.blocks[layer]
        return (block.ln2 if mlp_input else block.ln1).w.to(self.model.cfg.device)
