"""What differs between the releases of `transformers`, the reference."""

from typing import Any

import transformers

RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
KV_CACHE = "cache" if RELEASE >= (5, 24) else "past_key_values"
"""Argument of forward passes and of masks that takes the keys and values of earlier calls."""


def with_cache(cache: Any) -> dict[str, Any]:
    """Arguments of a call of the reference that goes on from a cache; None: an empty one."""
    return {KV_CACHE: cache, "use_cache": True}
