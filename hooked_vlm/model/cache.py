"""`VLMCache`: TransformerLens' `ActivationCache` for models with images and unfolded norms."""

from collections.abc import Iterable, Iterator
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import Slice, SliceInput

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.boxes import Part
from hooked_vlm.inputs.seen_pictures import seen_picture
from hooked_vlm.inputs.token_layout import real_span
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.model import cache_files
from hooked_vlm.model.cut import Spans, spans_of
from hooked_vlm.model.decompositions import DecomposingCache
from hooked_vlm.model.deriving import Derivation, DerivingCache
from hooked_vlm.nn.hooks import is_vision

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hooked_vlm.model.vlm import HookedVLM


class VLMCache(DecomposingCache):
    """Activations of one run, by hook name or TransformerLens' shorthand (`cache["pattern", 3]`).

    Image-side activations (batch axis: images) live in `cache.vision`, under their names without `vision.`:
    `cache.vision["resid_post", 1]`. Position slicing and batch removal leave them alone. They are also found
    here under their full hook names.
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
        row, at = _query(inputs, image, query)
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
        chosen = attention[:, inputs.image_tokens(image).to(attention.device)]
        laid_out = torch.from_numpy(np.ascontiguousarray(inputs.on_image(image, chosen, part)))
        return laid_out if head is None else laid_out[head]

    def show(
        self,
        layer: int,
        head: int | None = None,
        token: int = -1,
        image: int = 0,
        part: Part = "tiles",
        picture: Any = None,
    ) -> "Figure":
        """Draw the attention of one token over an image; a notebook shows the figure.

            cache.show(2, 1)                      # head 2.1, from the last token
            cache.show(2, picture=page.image)     # all heads of the layer, over the original

        Args:
            head: None for all heads, side by side.
            token: the query, a column of the inputs; negative ones count from the end of the image's row.
            picture: the original image. Without it the pixels that the model saw are shown, as coarse as its resizing
                left them.

        Raises:
            InputError: there is no image, or what `on_image` refuses.
            KeyError: as in `on_image`.
        """
        from hooked_vlm.analysis.pictures import overlay  # upwards: docs/architecture.md

        if self.inputs is not None and not self.inputs.n_images:
            raise InputError(
                'the run of this cache had no image to draw over: its attention is cache["pattern", layer]'
            )
        maps, inputs = self.on_image(layer, head, token, image, part), self.inputs
        assert inputs is not None  # `on_image` refuses
        row, at = _query(inputs, image, token)
        shown = seen_picture(inputs, image) if picture is None else picture
        own, heads = layer % self.derivation.n_layers, range(len(maps)) if head is None else [head]
        figure = overlay(shown, maps, [f"head {own}.{h}" for h in heads], "attention")
        figure.suptitle(
            f"attention of {inputs.spec.decode([int(inputs.tokens[row, at])])!r}, position {at}", fontsize=10
        )
        return figure


def _query(inputs: VLMInputs, image: int, query: int) -> tuple[int, int]:
    """The row of an image, and the position of a query in it; negative ones count from the row's end.

    Raises:
        InputError: there is no such image or query.
    """
    row = inputs.row_of_image(image)
    first, stop = inputs.first[row], inputs.stop[row]
    at = stop + query if query < 0 else query
    if not first <= at < stop:
        raise InputError(f"there is no query {query} in row {row}, whose tokens lie at {first} to {stop - 1}")
    return row, at
