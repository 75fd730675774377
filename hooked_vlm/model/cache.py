"""`VLMCache`: TransformerLens' `ActivationCache` for models with images and unfolded norms."""

from collections.abc import Iterable, Iterator
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice, SliceInput

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.boxes import Part
from hooked_vlm.inputs.token_layout import real_span
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.model import cache_files
from hooked_vlm.model.cut import Spans, at_real_positions, spans_of
from hooked_vlm.model.deriving import Derivation, DerivingCache
from hooked_vlm.nn.hooks import deepstack_points, is_vision

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


class VLMCache(DerivingCache):
    """Activations of one run, by hook name or TransformerLens' shorthand (`cache["pattern", 3]`).

    Image-side activations (batch axis: images) live in `cache.vision`, under their names without `vision.`:
    `cache.vision["resid_post", 1]`. Position slicing and batch removal leave them alone. They are also found
    here under their full hook names.

    `apply_ln` applies norms whole, weight included, so that decompositions rebuild the logits of a model whose
    norm weights are not folded.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: "HookedVLM | None",
        has_batch_dim: bool,
        text: Derivation,
        vision: Derivation,
        inputs: VLMInputs | None = None,
        cut: bool = False,
    ) -> None:
        """`cut`: the text side holds some positions of the inputs only."""
        self.inputs = inputs
        """Inputs of the run; None where the cache was cut to some rows, pickled or loaded."""
        self._cut = cut
        on_vision = {name.removeprefix("vision."): x for name, x in cache_dict.items() if is_vision(name)}
        super().__init__({n: x for n, x in cache_dict.items() if not is_vision(n)}, model, has_batch_dim, text)
        self.vision = DerivingCache(on_vision, model, True, vision, within="vision.")
        """The image side: [image, patch, ...], images padded at the end to the longest."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "inputs": None}

    def __copy__(self) -> Any:
        new = super().__copy__()
        new.vision = copy(self.vision)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = super().__deepcopy__(memo)
        new.vision = deepcopy(self.vision, memo)
        return new

    # ---------------------------------------------------------------- both sides, by the full names of hook points

    def keys(self) -> Iterable[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Names of all that is stored, the image side's included."""
        return self._stored().keys()

    def items(self) -> Iterable[tuple[str, Tensor]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Names and tensors of all that is stored, the image side's included."""
        return self._stored().items()

    def values(self) -> Iterable[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All tensors that are stored, the image side's included."""
        return self._stored().values()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored())

    def __len__(self) -> int:
        return len(self._stored())

    def _stored(self) -> dict[str, Tensor]:
        vision = {n if is_vision(n) else f"vision.{n}": x for n, x in self.vision.cache_dict.items()}
        return {**self.cache_dict, **vision}

    def save(self, folder: str | Path) -> None:
        """Write the tensors, and what it takes to derive patterns, into a folder (created if need be).

        Neither the model nor the inputs are written.

        Raises:
            OutputError: it cannot be written; nothing is left half-written.
        """
        facts = {"has_batch_dim": self.has_batch_dim, "cut": self._cut}
        cache_files.save(Path(folder), self._stored(), self.derivation, self.vision.derivation, facts)

    @classmethod
    def load(
        cls, folder: str | Path, model: "HookedVLM | None" = None, device: torch.device | str = "cpu"
    ) -> "VLMCache":
        """Read what `save` wrote.

        Args:
            model: the model of the run, for decompositions; patterns are derived without it.

        Raises:
            InputError: there is no such cache, or its file is damaged.
        """
        tensors, text, vision, facts = cache_files.load(Path(folder), device)
        return cls(tensors, model, facts["has_batch_dim"], text, vision, cut=facts["cut"])

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, str) and is_vision(key):
            return self.vision[key.removeprefix("vision.")]
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        if isinstance(key, str) and is_vision(key):
            return self.vision._own_name(key.removeprefix("vision.")) in self.vision.cache_dict
        return (self._own_name(key) if isinstance(key, str) else key) in self.cache_dict

    def follow(self, name: str, tensor: Tensor, inputs: VLMInputs | None) -> None:
        """Take an activation of a later pass, over `inputs`, in place of the first one's."""
        cache = self.vision if is_vision(name) else self
        cache.cache_dict[name.removeprefix("vision.")] = tensor
        self.inputs = inputs
        for side in (self, self.vision):
            side.derivation = replace(side.derivation, masks=(), why_not="later passes have written into this cache")

    def _known(self) -> Iterable[str]:
        return self._stored()

    def _spans(self) -> tuple[Spans, int] | None:
        """Where the tokens of each row lie, and the number of positions; None where that is not known."""
        if self.inputs is not None:
            return spans_of(self.inputs), self.inputs.shape[1]
        valid = self.derivation.masks[0].key_valid if self.derivation.masks else None
        if valid is None:
            return None
        return tuple(zip(*real_span(valid), strict=True)), valid.shape[1]

    def to(self, target: str | torch.device | torch.dtype) -> "VLMCache":
        super().to(target)
        self.vision.to(target)
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Slice | SliceInput) -> "VLMCache":
        """The text side cut to some rows, `cache.vision` whole. Patterns must be read before, or stored."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        why_not = "the cache was cut to some rows"
        text = replace(self.derivation, masks=(), why_not=why_not)
        out = VLMCache(sliced.cache_dict, self._model, sliced.has_batch_dim, text, self.vision.derivation)
        out.vision = self.vision
        return out

    def on_image(
        self,
        layer: int,
        head: int | None = None,
        query: int = -1,
        image: int = 0,
        part: Part = "tiles",
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
            raise InputError(
                "this cache was cut to some rows, or loaded, and does not know its images: ask before, or set "
                "cache.inputs to the inputs of the run"
            )
        row, tokens = inputs.row_of_image(image), inputs.image_tokens(image)
        first, stop = inputs.first[row], inputs.stop[row]
        at = stop + query if query < 0 else query
        if not first <= at < stop:
            raise InputError(f"there is no query {query} in row {row}, whose tokens lie at {first} to {stop - 1}")
        name = self._full_name(("pattern", layer))
        if name in self.cache_dict:
            pattern = self.cache_dict[name] if self.has_batch_dim else self.cache_dict[name][None]
            if pattern.shape[2] != inputs.shape[1]:
                raise InputError(f"{name} was stored for {pattern.shape[2]} queries only: cache it without pos_slice")
            attention = pattern[row, :, at]
        else:
            attention = self._derive(name, at)
            attention = (attention[row] if self.has_batch_dim else attention)[:, 0]
        if head is not None and not 0 <= head < len(attention):
            raise InputError(f"there is no head {head}: the model has heads 0 to {len(attention) - 1}")
        chosen = attention[:, tokens.to(attention.device)]
        laid_out = torch.from_numpy(np.ascontiguousarray(inputs.on_image(image, chosen, part)))
        return laid_out if head is None else laid_out[head]

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
        return super(VLMCache, added).stack_head_results(layer, return_labels, incl_remainder, pos_slice, apply_ln)

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
