"""HookedVLM and what belongs to it: cache, generation, weights in TransformerLens' shapes, hook points, memory."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.model.by_name import load
    from hooked_vlm.model.cache import VLMCache
    from hooked_vlm.model.fingerprints import provenance, weights_hash
    from hooked_vlm.model.hook_catalogue import HookRow, hook_table
    from hooked_vlm.model.memory import MemoryPlan, memory_plan, n_gpus
    from hooked_vlm.model.vlm import HookedVLM
    from hooked_vlm.model.weight_processing import center_unembed, fold_ln, fold_value_biases, untie

__all__ = [
    "HookRow", "HookedVLM", "MemoryPlan", "VLMCache", "center_unembed", "fold_ln", "fold_value_biases",
    "hook_table", "load", "memory_plan", "n_gpus", "provenance", "untie", "weights_hash",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
