"""Code of the documentation, run as it stands."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)


def run_page(name: str) -> dict[str, Any]:
    """Run the Python blocks of a page (its path in the repository) one after the other; the names they leave."""
    blocks = BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))
    assert blocks, f"{name} has no code"
    names: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    return names
