"""The pages of docs/ stand: their code runs block after block, their links lead somewhere, the site builds."""

import base64
import json
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from browsers import browser
from pages import BLOCK, ROOT, run_page

from hooked_vlm import cli

__all__ = ["browser"]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
RUN_ELSEWHERE = {
    "hooks.md",  # its example goes by names that a reader has; tests/nn/test_hooks.py runs every row of the table
    # tests/test_readme.py, which looks at results, too
    *("activations.md", "head-attribution.md", "patching.md", "sweeps.md", "viewer.md"),
}


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize(
    "page", [p for p in PAGES if BLOCK.search(p.read_text("utf-8")) and name_of(p) not in RUN_ELSEWHERE], ids=name_of
)
@pytest.mark.repeats_shapes
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page.relative_to(ROOT).as_posix())


def commands() -> list[str]:
    """Every `hooked-vlm` command in a block of a page, without comments and what it is piped to."""
    found = []
    for page in [ROOT / "README.md", *PAGES]:
        for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [re.split(r"\s[#|>]", line)[0].strip() for line in lines if line.startswith("hooked-vlm ")]
    return sorted({line for line in found if "COMMAND" not in line and "--help" not in line})


@pytest.mark.parametrize("command", commands())
def test_a_command_in_the_docs_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    monkeypatch.setattr(cli, "_run", asked.append)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with suppress(SystemExit):  # with its status
        cli.main()
    assert len(asked) == 1 or command.startswith("hooked-vlm completion")


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_picture_is_shown_somewhere() -> None:
    texts = "".join(page.read_text("utf-8") for page in [ROOT / "README.md", *PAGES])
    for picture in (DOCS / "pictures").iterdir():
        assert picture.name in texts, f"{picture.name} is on no page"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    from mkdocs.__main__ import cli

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.setattr(sys, "argv", ["mkdocs"])
        cli(["build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml"), "-d", str(folder)], standalone_mode=False)
    return folder


@pytest.mark.slow
def test_the_site_has_every_page_and_works_offline(site: Path) -> None:
    pages = {page.relative_to(site).parent.as_posix() for page in site.rglob("index.html")}
    assert {name_of(page).removesuffix(".md") for page in PAGES if page.name not in ("index.md", "README.md")} <= pages
    for page in site.rglob("*.html"):
        reached = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?)[^"]*)"', page.read_text("utf-8"))
        assert not reached, f"{page}: the site must work offline"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_site_shows_the_notebooks_with_their_pictures(site: Path, path: Path) -> None:
    page = site / "notebooks" / path.stem / "index.html"
    text = page.read_text("utf-8")
    held = [
        output["data"]["image/png"]
        for cell in json.loads(path.read_text("utf-8"))["cells"]
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    shown = [page.parent / source for source in re.findall(r'<img [^>]*src="([^"]+)"', text)]
    assert [picture.read_bytes() for picture in shown] == [base64.b64decode("".join(png)) for png in held]
    assert f'href="../{path.name}"' in text


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_code_is_no_wider_than_the_page(browser: Any, site: Path, width: int) -> None:
    opened = browser.new_page(viewport={"width": width, "height": 900})
    for page in sorted(site.rglob("index.html")):
        opened.goto(page.as_uri())
        wide = opened.evaluate(
            "[...document.querySelectorAll('pre > code')].filter(c => c.scrollWidth > c.clientWidth + 1).length"
        )
        assert not wide and opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), page
