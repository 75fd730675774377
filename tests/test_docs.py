"""The pages of docs/ stand: their code runs block after block, their links lead somewhere, the site builds."""

import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from pages import BLOCK, ROOT, run_page

from hooked_vlm import cli

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


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mkdocs.__main__ import cli

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    monkeypatch.setattr(sys, "argv", ["mkdocs"])
    cli(["build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)], standalone_mode=False)
    pages = {page.relative_to(tmp_path).parent.as_posix() for page in tmp_path.rglob("index.html")}
    assert {name_of(page).removesuffix(".md") for page in PAGES if page.name not in ("index.md", "README.md")} <= pages
    for page in tmp_path.rglob("*.html"):
        reached = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?)[^"]*)"', page.read_text("utf-8"))
        assert not reached, f"{page}: the site must work offline"
