"""docs/notebooks/*.ipynb: what the files docs/notebooks/*.py say, run cell by cell in a kernel, with their outputs.

`python -m tools.notebooks` writes them; it needs nbclient and ipykernel (the extra `dev`). Edit the Python files.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from hooked_vlm.runtime.files import atomic_write

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOT_RUN = ("4_qwen2_vl_2b",)
"""Notebooks of published checkpoints: written without outputs."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "file_extension": ".py"},
}
_CELL = re.compile(r"^# %%(.*)\n", flags=re.MULTILINE)


def cells(source: str) -> Iterator[tuple[str, str]]:
    """Kind ("markdown" or "code") and text of each cell of a file with `# %%` marks."""
    _, *parts = _CELL.split(source)
    for mark, text in zip(parts[::2], parts[1::2], strict=True):
        if "[markdown]" in mark:
            yield "markdown", re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)
        else:
            yield "code", text.strip()


def notebook(path: Path) -> Any:
    """The notebook of a file, without outputs."""
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    source = path.read_text(encoding="utf-8")
    made = [make[kind](text, id=f"cell-{i}") for i, (kind, text) in enumerate(cells(source))]
    return nbformat.v4.new_notebook(cells=made, metadata=METADATA)


def executed(path: Path) -> Any:
    """The notebook of a file with the outputs of its code; a picture is kept as PNG alone.

    Raises:
        nbclient.exceptions.CellExecutionError: the code of a cell failed.
    """
    made = notebook(path)
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # progress bars ask for widgets
    NotebookClient(made, timeout=600, kernel_name="python3", record_timing=False).execute()
    made.metadata = nbformat.from_dict(METADATA)  # without the version of this machine's Python
    for cell in made.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data = nbformat.from_dict({"image/png": output.data["image/png"].strip()})
    return made


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.py")):
        made = notebook(path) if path.stem in NOT_RUN else executed(path)
        target = path.with_suffix(".ipynb")
        atomic_write(target, lambda aside, made=made: nbformat.write(made, aside))
        print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")
