"""The modules of both towers: attention, norms, blocks, rotary embeddings, masks, key-value cache, hook points."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.nn.attention import Attention
    from hooked_vlm.nn.block import Block
    from hooked_vlm.nn.hooks import HookPoint, bound_to_pass
    from hooked_vlm.nn.kv_cache import KVCache
    from hooked_vlm.nn.masks import AttentionMask

__all__ = ["Attention", "AttentionMask", "Block", "HookPoint", "KVCache", "bound_to_pass"]
__getattr__, __dir__ = lazy_names(__name__)
