"""Pictures of docs/gallery.md, from its own code.

`python -m tools.gallery` makes docs/pictures/gallery again.
"""

import ast
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from hooked_vlm.runtime.files import atomic_write

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "gallery.md"
BLOCK = re.compile(r"```python\n(.*?)```(?:\s*!\[[^\]]*\]\((\S+?)\))?", flags=re.DOTALL)
"""A block of code, and the picture behind it."""
DPI, WIDEST = 90, 800


def blocks() -> list[tuple[str, str]]:
    """Code and picture of each block of the page; the first makes none."""
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def figures() -> Iterator[tuple[str, Any]]:
    """Name of each picture, and the figure that its code ends with."""
    names: dict[str, Any] = {}
    for code, picture in blocks():
        value = run_cell(code, names)
        if picture:
            yield picture, value


def run_cell(code: str, names: dict[str, Any]) -> Any:
    """Run code as a notebook does: the value of its last line, if that is an expression."""
    *body, last = ast.parse(code).body
    exec(compile(ast.Module(body, []), PAGE.name, "exec"), names)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), PAGE.name, "eval"), names)
    exec(compile(ast.Module([last], []), PAGE.name, "exec"), names)
    return None


def small_png(figure: Any) -> bytes:
    """A figure as a PNG of bounded width."""
    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    with Image.open(drawn) as picture:
        shown = picture.convert("RGB")
        shown.thumbnail((WIDEST, WIDEST))
        shown.save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    for picture, figure in figures():
        png = small_png(figure)
        atomic_write(DOCS / picture, lambda aside, png=png: aside.write_bytes(png))
        print(f"{picture}: {len(png) / 1000:.0f} kB")
