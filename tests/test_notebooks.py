"""Notebooks are the cells of their Python files, and running them gives the outputs that they hold."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
N_PICTURES = {"1_cache_and_look": 4, "2_patch_an_image_region": 3, "3_ablate_and_steer": 2}
SAYS = {
    "1_cache_and_look": "heads that look at the value most: ['2.0', '2.1']",
    "2_patch_an_image_region": "the page says 7h2k, the model now says nwil",
    "3_ablate_and_steer": "a drawn square, steered: circle",
}
NAMES = [*N_PICTURES, "4_qwen2_vl_2b"]
WIDEST = 88
"""Columns of code that a page of the site shows without a break."""


def stored(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def outputs(notebook: Any) -> list[dict[str, Any]]:
    return [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]


def text_of(output: dict[str, Any]) -> str:
    return "".join(output.get("text", ())) or "".join(output.get("data", {}).get("text/plain", ()))


def pictures(notebook: Any) -> list[str]:
    return [png for output in outputs(notebook) if (png := output.get("data", {}).get("image/png"))]


def test_every_file_has_a_notebook_and_a_line_in_the_list() -> None:
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    for kind in ("py", "ipynb"):
        assert sorted(path.stem for path in FOLDER.glob(f"*.{kind}")) == NAMES
    assert all(f"({name}.ipynb)" in listed for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_the_cells_of_its_file(name: str) -> None:
    """Read in another way than the tool does: line by line."""
    cells: list[tuple[str, list[str]]] = []
    for line in (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("# %%"):
            cells.append(("markdown" if "[markdown]" in line else "code", []))
        else:
            cells[-1][1].append(line[2:] if cells[-1][0] == "markdown" else line)
    notebook = stored(name)
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert found == [(kind, "\n".join(lines).strip()) for kind, lines in cells]
    code = [line for kind, lines in cells if kind == "code" for line in lines]
    assert max(map(len, code)) <= WIDEST
    compile("\n".join(code), name, "exec")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_holds_what_it_showed(name: str) -> None:
    notebook = stored(name)
    assert len(pictures(notebook)) == N_PICTURES.get(name, 0)
    for png in pictures(notebook):
        with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
            assert picture.format == "PNG" and picture.width > 60
    said = "".join(map(text_of, outputs(notebook)))
    assert SAYS.get(name, "") in said
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    assert "/site-packages/" not in json.dumps(notebook)  # nothing of the machine it ran on
    executed = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert executed == (list(range(1, len(executed) + 1)) if name in SAYS else [None] * len(executed))


@pytest.mark.slow
@pytest.mark.parametrize("name", N_PICTURES)
def test_running_a_notebook_gives_its_outputs_again(name: str) -> None:
    """Words are equal, numbers up to rounding, pictures as many in the same cells."""
    pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    from tools.notebooks import executed

    before, now = outputs(stored(name)), outputs(executed(FOLDER / f"{name}.py"))
    assert [output["output_type"] for output in now] == [output["output_type"] for output in before]
    for old, new in zip(before, now, strict=True):
        assert ("image/png" in old.get("data", {})) == ("image/png" in new.get("data", {}))
        (words, numbers), (new_words, new_numbers) = map(told_apart, (text_of(old), text_of(new)))
        assert new_words == words
        assert new_numbers == pytest.approx(numbers, rel=0.02, abs=0.002)


def told_apart(text: str) -> tuple[list[str], list[float]]:
    """The words and the numbers of a text."""
    number = r"(?<![\w.])-?\d+\.?\d*(?:e-?\d+)?(?!\w)"
    return re.sub(number, " ", text).split(), [float(found) for found in re.findall(number, text)]
