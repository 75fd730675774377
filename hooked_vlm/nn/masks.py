"""Who sees whom: the attention mask as a rule, materialised only for requested queries."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Mask of the keys that queries see; no [pos, pos] tensor is built unless a pattern is hooked.

    The queries are the last `n_queries` of the keys. Real keys of a row are one contiguous run
    (padding at either end or none); `key_valid` is None when nothing is padded.
    """

    causal: bool
    key_valid: Bool[Tensor, "batch key"] | None = None
    uncached_left_padding: Int[Tensor, "batch"] | None = None
    """Padding before each row, given where queries and keys are the same positions."""
    window: int | None = None
    """How many keys a query may see at most, itself included (sliding window); None: no limit."""

    def to(self, device: torch.device) -> "AttentionMask":
        valid, padding = self.key_valid, self.uncached_left_padding
        return AttentionMask(
            self.causal,
            None if valid is None else valid.to(device),
            None if padding is None else padding.to(device),
            self.window,
        )

    def limits(self, n_keys: int) -> bool:
        """Whether the window hides any of `n_keys` keys."""
        return self.window is not None and self.window < n_keys

    def query_valid(self, n_queries: int) -> Bool[Tensor, "batch query"] | None:
        return None if self.key_valid is None else self.key_valid[:, -n_queries:]

    def dense(self, n_queries: int, n_keys: int, device: torch.device) -> Bool[Tensor, "#batch 1 query key"]:
        """The mask written out for the last queries. A padding query sees itself: its softmax stays finite."""
        return self.visible(torch.arange(n_keys - n_queries, n_keys, device=device)[None], n_keys)

    def visible(self, queries: Int[Tensor, "#batch query"], n_keys: int) -> Bool[Tensor, "#batch 1 query key"]:
        """The mask written out for the queries at some positions (counted as keys are)."""
        at, keys = queries[:, :, None], torch.arange(n_keys, device=queries.device)
        seen = keys <= at if self.causal else torch.ones_like(keys <= at)
        if self.window is not None:
            seen = seen & (keys > at - self.window)
        if self.key_valid is not None:
            seen = (seen & self.key_valid[:, None, :]) | (keys == at)
        return seen[:, None]
