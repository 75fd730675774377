"""`DerivingCache`: an activation cache that makes scores and patterns from cached queries and keys."""

from collections.abc import Iterable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import get_act_name

from hooked_vlm.errors import InputError
from hooked_vlm.nn.hooks import canonical, nearest_names
from hooked_vlm.nn.masks import AttentionMask
from hooked_vlm.nn.scores import PLAIN, Scoring, attention_pattern, masked_scores

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


@dataclass(frozen=True, eq=False)
class Derivation:
    """What it takes to derive a tower's scores and patterns from cached queries and keys."""

    n_layers: int
    masks: tuple[AttentionMask, ...] = ()
    """One for each kind of layers; none where it is not known."""
    why_not: str = ""
    """Why patterns cannot be derived; empty if they can."""
    rotary: bool = True
    """Whether scores are made of rotated queries and keys."""
    normed: bool = False
    """Whether queries and keys have norms of their own."""
    exchanged: frozenset[str] = frozenset()
    """Attention modules in which another module stands in the place of scores or pattern: nothing is derived."""
    kind_of: tuple[int, ...] = ()
    """The kind of each layer; empty where all are alike."""
    scoring: Scoring = PLAIN

    def mask_of(self, layer: int) -> AttentionMask | None:
        """Who sees whom in a layer."""
        return self.masks[self.kind_of[layer] if self.kind_of else 0] if self.masks else None


class DerivingCache(ActivationCache):
    """An `ActivationCache` that need not hold scores and patterns.

    `cache["pattern", l]` and `cache["attn_scores", l]` are derived from the cached queries and keys (rotated ones where
    positions are rotary) unless they were stored: where the layer ran explicitly because its scores or pattern had a
    hook, or where they were named in `names_filter`.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: "HookedVLM | None",
        has_batch_dim: bool,
        derivation: Derivation,
        within: str = "",
    ) -> None:
        """`within` is what the names of these activations begin with in the model."""
        super().__init__(cache_dict, model, has_batch_dim)
        self.derivation, self._within = derivation, within

    @property
    def model(self) -> "HookedVLM":  # pyright: ignore[reportIncompatibleVariableOverride] (narrower)
        """The model of the run, which decompositions need.

        Raises:
            InputError: the cache was pickled, saved or told to forget it.
        """
        if self._model is None:
            raise InputError("this cache has no model, which decompositions need: set cache.model, or load it with one")
        return self._model

    @model.setter
    def model(self, model: "HookedVLM | None") -> None:
        self._model = model

    def __getstate__(self) -> dict[str, Any]:
        """The tensors, and what it takes to derive others: no model."""
        return {**self.__dict__, "_model": None, "cache_dict": own_tensors(self.cache_dict)}

    def __copy__(self) -> Any:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.cache_dict = dict(self.cache_dict)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = copy(self)
        new.cache_dict = deepcopy(self.cache_dict, memo)
        return new

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
            key = (key[0], self.derivation.n_layers + key[1], *key[2:])
        return self._own_name(get_act_name(*key))

    def _own_name(self, name: str) -> str:
        return canonical(name, self.cache_dict)

    def _derive(self, name: str, query: int | None = None) -> Tensor:
        """The scores or pattern of a layer from its queries and keys, of all queries or of one."""
        prefix = name.rsplit(".", 1)[0]
        compared = "rot_{}" if self.derivation.rotary else "{}_normed" if self.derivation.normed else "{}"
        needed = [f"{prefix}.hook_{compared.format(side)}" for side in "qk"]
        why_not, mask = self.derivation.why_not, self.derivation.mask_of(int(prefix.split(".")[1]))
        if any(n not in self.cache_dict for n in needed) or mask is None:
            why_not = why_not or f"{needed[0]} and {needed[1]} are not in this cache"
        if f"{self._within}{prefix}" in self.derivation.exchanged:
            why_not = "another module stands in the place of its hook point"
        if why_not or mask is None:
            raise KeyError(
                f"{name!r} was not stored and cannot be derived ({why_not}): name it in names_filter to have "
                "it computed in the run"
            )
        q, k = (self.cache_dict[n] if self.has_batch_dim else self.cache_dict[n][None] for n in needed)
        mask = mask.to(q.device)
        valid = mask.query_valid(q.shape[1])
        queries = torch.arange(q.shape[1], device=q.device)
        if query is not None:
            q, queries = q[:, [query]], queries[[query]]
            valid = None if valid is None else valid[:, [query]]
        scores = masked_scores(q, k, mask, self.derivation.scoring, queries[None])
        if name.endswith("hook_attn_scores"):
            return scores if self.has_batch_dim else scores[0]
        pattern = attention_pattern(scores, valid)
        return pattern if self.has_batch_dim else pattern[0]

    def to(self, target: str | torch.device | torch.dtype) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """On another device, or in another dtype (truth values and whole numbers keep theirs)."""
        if isinstance(target, torch.dtype):
            kept = {name: x.to(target) if x.is_floating_point() else x for name, x in self.cache_dict.items()}
            self.cache_dict = kept
            return self
        super().to(target)
        masks = tuple(mask.to(torch.device(target)) for mask in self.derivation.masks)
        self.derivation = replace(self.derivation, masks=masks)
        return self


def own_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without the memory of larger ones that they are parts of, each once where names share it."""
    made: dict[tuple, Tensor] = {}
    taken: set[int] = set()
    own = {}
    for name, x in tensors.items():
        storage = x.untyped_storage()
        key = (storage.data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype, x.device)
        if key not in made:
            whole = x.is_contiguous() and storage.nbytes() == x.nbytes and storage.data_ptr() not in taken
            made[key] = x.detach() if whole else x.detach().clone(memory_format=torch.contiguous_format)
            taken.add(storage.data_ptr())
        own[name] = made[key]
    return own
