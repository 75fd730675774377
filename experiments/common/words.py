"""Words of answers and reports."""

from collections.abc import Sequence


def listed(parts: Sequence[str]) -> str:
    """Join parts as in "a, b and c"; at least one."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
