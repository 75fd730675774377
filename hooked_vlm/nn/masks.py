"""Who sees whom: the attention mask as a rule, materialised only for requested queries."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Mask of the keys that queries see; no [pos, pos] tensor is built unless a pattern is hooked or blocks or a window
    leave no rule that a kernel knows, and then none is kept.

    The queries are the last `n_queries` of the keys. Real keys of a row are one contiguous run
    (padding at either end or none); `key_valid` is None when nothing is padded.
    """

    causal: bool
    key_valid: Bool[Tensor, "batch key"] | None = None
    uncached_left_padding: Int[Tensor, "batch"] | None = None
    """Padding before each row, given where queries and keys are the same positions."""
    window: int | None = None
    """How many keys a query may see at most, itself included (sliding window); None: no limit. Of a block's later keys
    it hides none."""
    blocks: Int[Tensor, "batch key"] | None = None
    """Number of the block that a key lies in, -1 for none. A causal mask shows a query the later keys of its block,
    too; any other mask shows it the keys of its block alone."""
    window_cuts_blocks: bool = True
    """Whether the window hides earlier keys of a query's own block."""

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "AttentionMask":
        tensors = {name: getattr(self, name) for name in ("key_valid", "uncached_left_padding", "blocks")}
        return replace(self, **{name: None if x is None else change(x) for name, x in tensors.items()})

    def to(self, device: torch.device) -> "AttentionMask":
        return self._with_tensors(lambda x: x.to(device))

    def rows(self, first: int, stop: int) -> "AttentionMask":
        """That of rows `first` to `stop` - 1 of the batch."""
        return self._with_tensors(lambda x: x[first:stop])

    def repeat(self, n: int) -> "AttentionMask":
        """That of `n` runs of the same batch."""
        return self if n == 1 else self._with_tensors(lambda x: x.repeat(n, *[1] * (x.ndim - 1)))

    def limits(self, n_keys: int) -> bool:
        """Whether the window hides any of `n_keys` keys."""
        return self.window is not None and self.window < n_keys

    def is_simple(self, n_queries: int, n_keys: int) -> bool:
        """Whether padding and causality alone decide what the last queries see."""
        last_alone = self.causal and n_queries == 1  # which has no later keys in its block
        return not self.limits(n_keys) and (self.blocks is None or last_alone)

    def query_valid(self, n_queries: int) -> Bool[Tensor, "batch query"] | None:
        return None if self.key_valid is None else self.key_valid[:, -n_queries:]

    def dense(self, n_queries: int, n_keys: int, device: torch.device) -> Bool[Tensor, "#batch 1 query key"]:
        """The mask written out for the last queries. A padding query sees itself: its softmax stays finite."""
        return self.visible(torch.arange(n_keys - n_queries, n_keys, device=device)[None], n_keys)

    def visible(self, queries: Int[Tensor, "#batch query"], n_keys: int) -> Bool[Tensor, "#batch 1 query key"]:
        """The mask written out for the queries at some positions (counted as keys are)."""
        at, keys = queries[:, :, None], torch.arange(n_keys, device=queries.device)
        seen = keys <= at if self.causal else torch.ones_like(keys <= at)
        block = None if self.blocks is None else self._in_own_block(self.blocks, queries)
        if block is not None:
            seen = seen | block if self.causal else seen & block
        if self.window is not None:
            near = keys > at - self.window
            seen = seen & (near if block is None or self.window_cuts_blocks else near | block)
        if self.key_valid is not None:
            seen = (seen & self.key_valid[:, None, :]) | (keys == at)
        return seen[:, None]

    def _in_own_block(
        self, blocks: Int[Tensor, "batch key"], queries: Int[Tensor, "#batch query"]
    ) -> Bool[Tensor, "batch query key"]:
        own = blocks.gather(1, queries.expand(len(blocks), -1))[:, :, None]
        return (blocks[:, None, :] == own) & (own >= 0)
