"""The report page: one file, escaped, complete, the answer first, the same on every run."""

import base64
import gzip
import json
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from hooked_vlm import HookedVLM
from hooked_vlm.experiments.common.figures import DOUBLE, SINGLE, new_figure
from hooked_vlm.experiments.common.finding import Finding
from hooked_vlm.experiments.common.report import SOFTWARE, Report, files_of
from hooked_vlm.model.fingerprints import provenance, weights_hash

FRAME = pd.DataFrame(
    {"head": ["0.1", "<script>", "0.3"], "score": [0.25, np.nan, 0.75], "n": [1200, 3, 20], "ok": [True, False, True]}
)
MORE = pd.concat([FRAME] * 4, ignore_index=True)
LONG = pd.DataFrame({"sample": range(5000), "value": np.random.default_rng(0).integers(10**9, size=5000)})
PICTURES = pd.DataFrame({"name": ["cat"]}).assign(picture=[Image.new("RGB", (30, 20), "red")])
VOID = {"meta", "link", "img", "source", "br"}


class Page(HTMLParser):
    """Elements of a page in order: (tag, attributes, text inside)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = (tag, {name: value or "" for name, value in attrs}, [])
        self.found.append(own)
        if tag not in VOID:
            self.open.append(own)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text.append(data)

    def all(self, tag: str, **attributes: str) -> list[tuple[dict[str, str], str]]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [(a, "".join(text).strip()) for t, a, text in self.found if t == tag and wanted.items() <= a.items()]


def built() -> Report:
    report = Report("Title <b>", "lead", "hooked-vlm ocr-heads mask --model 'my model'", "A. Author. A paper")
    report.answer = ["Head 2.1 reads.", "It scores 0.81 (0.78 to 0.84)."]
    report.section("First", "One & two, `code`.")
    for name, width in (("line", SINGLE), ("wide", DOUBLE)):
        figure = new_figure(width, 2)
        figure.subplots().plot([1, 2])
        report.figure(name, figure, f"A {name}")
    report.table("scores", MORE, "Scores", shown=11)
    report.table("replies", LONG, "All replies", shown=0)
    report.table("nothing", FRAME.head(0), "Agreement")
    report.section("Second")
    report.table("all", FRAME, "All")
    report.table("pictures", PICTURES, "Pictures")
    return report


def write(out: Path, zipped: bool = False) -> str:
    record = {"seed": 0, "model": "toy", "weights": "abc", "versions": {"hooked-vlm": "0.2.0", "torch": "2"}}
    return built().write(out, record, zipped).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write(tmp_path_factory.mktemp("report")))


def test_page(tmp_path: Path) -> None:
    page = write(tmp_path / "a")
    assert "Title &lt;b&gt;" in page and "<code>code</code>" in page
    assert "<script>" not in re.sub(r"<script>\nfor .*?</script>", "", page, flags=re.DOTALL)
    assert "(11 of 12 rows)" in page
    assert "1,200" in page
    assert json.loads((tmp_path / "a" / "run.json").read_text())["seed"] == 0
    figures = {path.name for path in (tmp_path / "a" / "figures").iterdir()}
    assert figures == {name + suffix for name in ("line", "wide") for suffix in (".png", ".svg", ".pdf", "-dark.svg")}
    tables = {path.name for path in (tmp_path / "a" / "tables").iterdir()}
    names = ("scores", "replies", "nothing", "all", "pictures")
    assert tables == {f"{name}.{suffix}" for name in names for suffix in ("parquet", "csv")}
    for name in names:
        parquet = pd.read_parquet(tmp_path / "a" / "tables" / f"{name}.parquet")
        csv = pd.read_csv(tmp_path / "a" / "tables" / f"{name}.csv", dtype=parquet.dtypes.to_dict())
        pd.testing.assert_frame_equal(csv, parquet, check_exact=True)
    assert len(pd.read_parquet(tmp_path / "a" / "tables" / "scores.parquet")) == 12


def test_the_report_page_is_one_file(page: Page) -> None:
    """Nothing is fetched, and every link leads into the page or holds its content."""
    ids = {attributes["id"] for _, attributes, _ in page.found if "id" in attributes}
    urls = [a[name] for _, a, _ in page.found for name in ("src", "srcset", "href") if name in a]
    assert len(urls) > 10
    for url in urls:
        assert url.startswith("data:") or (url.startswith("#") and url[1:] in ids), url[:80]
    style = "".join(text for _, text in page.all("style"))
    assert "url(" not in style and "@import" not in style
    assert not page.all("script")[0][0]  # no src


def test_downloads_in_the_report_page_hold_figures_and_all_rows(page: Page) -> None:
    links = {a["download"]: a["href"] for a, _ in page.all("a", class_="download")}
    assert set(links) == {"line.svg", "wide.svg", "scores.csv", "replies.csv.gz", "all.csv", "pictures.csv"}
    contents = {name: base64.b64decode(url.partition("base64,")[2]) for name, url in links.items()}
    assert contents["line.svg"].startswith(b"<?xml")
    assert contents["scores.csv"].decode().count("\n") == 1 + len(MORE)
    assert gzip.decompress(contents["replies.csv.gz"]).decode().count("\n") == 1 + len(LONG)


def test_the_report_begins_with_the_answer_and_ends_with_what_is_folded_away(page: Page) -> None:
    order = [(tag, "".join(text).strip()) for tag, _, text in page.found]
    expected = [("p", "Head 2.1 reads."), ("p", "It scores 0.81"), ("p", "One & two"), ("figcaption", "Figure 1.")]
    expected += [("p", "Agreement: there is nothing"), ("p", "Table 1. Scores"), ("p", "Table 2. All")]
    expected += [("p", "Table 3. Pictures"), ("details", "All replies"), ("p", "Table 4. All replies")]
    expected += [("pre", "hooked-vlm"), ("p", "A. Author"), ("pre", '"seed": 0')]
    places = [next(i for i, (t, text) in enumerate(order) if t == tag and begins in text) for tag, begins in expected]
    assert places == sorted(places)
    folded = "".join(text for _, text in page.all("details"))
    assert "Table 4." in folded and '"seed": 0' in folded and "Table 1." not in folded
    assert not [text for _, text in page.all("td") if "nan" in text.lower()]
    assert len(page.all("table")) == 3


def test_numbers_in_a_report_are_aligned_to_the_right_and_every_head_has_a_sign(page: Page) -> None:
    heads = page.all("th")
    assert [a["class"] for a, _ in heads[:4]] == ["text", "number", "number", "text"]
    cells = page.all("td")[:4]
    assert [a["class"] for a, _ in cells] == ["text", "number", "number", "text"]
    assert [a["data-key"] for a, _ in cells] == ["0.1", "0.25", "1200.0", "1"]
    n_sorted = len([a for a, _ in heads if a["class"] != "picture"])
    assert len(page.all("span", class_="sign")) == n_sorted == len(heads) - 1
    style = "".join(text for _, text in page.all("style"))
    assert re.search(r"td\.number \{ text-align: right", style) and '.sign::before { content: "↕"' in style


def test_figures_of_a_report_have_a_dark_version_and_stay_readable_on_a_phone(page: Page) -> None:
    sources = page.all("source", media="screen and (prefers-color-scheme: dark)")
    images = [a for a, _ in page.all("img") if "width" in a]
    assert len(sources) == len(images) == 2
    for (source, _), image in zip(sources, images, strict=True):
        assert source["srcset"].startswith("data:image/svg+xml;base64,") and source["srcset"] != image["src"]
    assert [int(image["width"]) for image in images] == [336, 691]
    for image in images:  # 8 pt are 10.7 px at full width: at least nine remain
        least = int(re.search(r"min-width: min\((\d+)px", image["style"])[1])  # pyright: ignore
        assert least / int(image["width"]) * 8 * 96 / 72 >= 9


def test_a_report_written_twice_is_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    for name in "ab":
        assert "1 January 1970" in write(tmp_path / name / "out", zipped=True)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 8 + 10 + 3
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_the_zipped_report_is_complete_and_stays_up_to_date(tmp_path: Path) -> None:
    write(tmp_path / "out", zipped=True)
    (tmp_path / "out" / "parts").mkdir()
    (tmp_path / "out" / "parts" / "x").touch()
    write(tmp_path / "out")  # not asked for again, but it must not differ from what lies beside it
    with zipfile.ZipFile(tmp_path / "out" / "report.zip") as packed:
        assert packed.testzip() is None
        names = {name.partition("/")[2]: name for name in packed.namelist()}
        assert {name.partition("/")[0] for name in packed.namelist()} == {"out"}
        here = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        kept = {path.relative_to(tmp_path / "out").as_posix(): path for path in here}
        assert set(names) == set(kept) - {"parts/x", "report.zip"}
        for name, inside in names.items():
            assert packed.read(inside) == kept[name].read_bytes()
    assert files_of(tmp_path / "out" / "report.html")["zip"] == str(tmp_path / "out" / "report.zip")


def test_a_finding_is_a_section_of_the_report(tmp_path: Path) -> None:
    report = Report("x")
    report.finding(Finding("Heading", ["only for the terminal"], ["About."], {}, {"all": (FRAME, "All", None)}))
    report.finding(Finding("Bare", ["said nowhere else"]))
    text = report.write(tmp_path, {}).read_text()
    assert "Heading" in text and "About." in text and "Table 1." in text and "said nowhere else" in text
    assert "only for the terminal" not in text


def test_the_software_to_cite_is_that_of_the_citation_file() -> None:
    assert f'title: "{SOFTWARE}"' in (Path(__file__).parents[3] / "CITATION.cff").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_in_a_browser(browser: Any, tmp_path: Path, scheme: str) -> None:
    """Mailed alone: sorts, shows the figure of the page's colours, and is no wider than a phone."""
    report = built()
    report.table("wide", pd.DataFrame([range(40)], columns=[f"column {i}" for i in range(40)]), "Wide")
    page_file = report.write(tmp_path / "out", {"seed": 0}).rename(tmp_path / "mailed.html")
    context = browser.new_context(viewport={"width": 360, "height": 800}, color_scheme=scheme)
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    table = page.locator("#table-2")
    shown = lambda: table.locator("tbody td:nth-child(2)").all_inner_texts()  # noqa: E731
    head, sign = table.locator("th:nth-child(2)"), "getComputedStyle(e.querySelector('.sign'), '::before').content"
    assert head.evaluate(f"e => {sign}") == '"↕"' and shown() == ["0.25", "–", "0.75"]
    for expected, mark in ((["0.75", "0.25", "–"], "▼"), (["0.25", "0.75", "–"], "▲")):
        head.locator("button").click()
        assert shown() == expected and head.evaluate(f"e => {sign}") == f'"{mark}"'
    right = "e => getComputedStyle(e).textAlign"
    assert table.locator("td.number").first.evaluate(right) == head.evaluate(right) == "right"
    used = page.locator("figure img").first.evaluate("e => e.currentSrc === e.src")
    assert used == (scheme == "light")
    assert page.locator("figure img").first.evaluate("e => e.naturalWidth") > 0
    assert page.locator(".table.wide").count() == 1
    context.close()


def test_the_hash_stands_for_the_weights() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    first = weights_hash(model)
    assert first == weights_hash(HookedVLM.from_pretrained("toy-qwen2-vl"))
    assert provenance(model)["weights"] == first
    with torch.no_grad():
        weight = model.blocks[1].mlp.gate.weight if hasattr(model.blocks[1].mlp, "gate") else model.embed.weight
        weight[[0, 1]] = weight[[1, 0]].clone()  # two rows exchanged
    assert weights_hash(model) != first
