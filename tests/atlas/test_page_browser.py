"""The page of an atlas in a real browser."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browsers import browser
from made_up_atlas import made_up_atlas, made_up_pictures
from PIL import Image
from scipy import stats
from viewing import DESKTOP, PHONE, Opened

from hooked_vlm.atlas.comparison import compare
from hooked_vlm.atlas.definitions import BY_NAME
from hooked_vlm.atlas.page import Picture, save_atlas_page
from hooked_vlm.atlas.result import Atlas, Observed

__all__ = ["browser"]
pytestmark = pytest.mark.slow

LAYERS, HEADS = 12, 8
LEFT, TOP, RIGHT, BOTTOM = 26, 4, 4, 18
"""Margins of a map in pixels."""
SOON = 100
"""Milliseconds."""
ORANGE, BLACK = [213, 94, 0, 255], [0, 0, 0, 255]


def after(name: str, values: np.ndarray) -> None:
    """What training changed."""
    values += 0.01 * np.random.default_rng(4).standard_normal(values.shape)
    if name == "induction":
        values[:, 3, 5] += 0.4
    if name == "transfer":
        values[:, 7, 1] -= 0.3


@pytest.fixture(scope="module")
def found() -> Atlas:
    return made_up_atlas("made-up/model", (LAYERS, HEADS), (6, 5))


@pytest.fixture(scope="module")
def trained() -> Atlas:
    return made_up_atlas("made-up/trained", (LAYERS, HEADS), (6, 5), edit=after)


@pytest.fixture(scope="module")
def one(found: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_atlas_page(tmp_path_factory.mktemp("atlas") / "one.html", found, made_up_pictures())


@pytest.fixture(scope="module")
def two(found: Atlas, trained: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_atlas_page(tmp_path_factory.mktemp("atlas") / "two.html", found, other=trained)


class Page(Opened):
    """A page of an atlas."""

    def __init__(self, browser: Any, path: Path, size: dict[str, int] = DESKTOP, scheme: str = "light") -> None:
        super().__init__(browser, path, size, scheme)
        self.maps = self.page.locator("#maps .map > canvas")

    def spot(self, number: int, layer: int, head: int, shape: tuple[int, int] = (LAYERS, HEADS)) -> tuple[float, float]:
        """Middle of a head's cell in a map, in pixels of the map."""
        box = self.maps.nth(number).bounding_box()
        wide, high = box["width"] - LEFT - RIGHT, box["height"] - TOP - BOTTOM
        return LEFT + (head + 0.5) * wide / shape[1], TOP + (layer + 0.5) * high / shape[0]

    def hover(self, number: int, layer: int, head: int, shape: tuple[int, int] = (LAYERS, HEADS)) -> None:
        x, y = self.spot(number, layer, head, shape)
        self.maps.nth(number).hover(position={"x": x, "y": y})

    def click(self, number: int, layer: int, head: int) -> None:
        x, y = self.spot(number, layer, head)
        self.maps.nth(number).click(position={"x": x, "y": y})

    def edge(self, number: int, layer: int, head: int) -> list[int]:
        """Colour of a map at the left edge of a cell, where an outline runs."""
        box = self.maps.nth(number).bounding_box()
        x, y = self.spot(number, layer, head)
        x -= (box["width"] - LEFT - RIGHT) / HEADS / 2 + 2
        return self.maps.nth(number).evaluate(
            """(canvas, [x, y]) => {
            const { data } = canvas.getContext("2d").getImageData(Math.round(x), Math.round(y), 1, 1);
            return [...data]; }""",
            [x, y],
        )

    def heading(self) -> str:
        return self.page.locator("#card h2").inner_text()

    def card(self) -> dict[str, list[str]]:
        """Cells of the card by the titles of the scores."""
        rows = self.page.locator("#card .scores tbody tr")
        return {
            own[0]: own[1:]
            for own in rows.evaluate_all("rows => rows.map(row => [...row.cells].map(c => c.innerText))")
        }

    def listed(self) -> list[str]:
        """Heads in the table, in its order."""
        return self.page.locator("#table tbody tr:not([hidden]) th button").all_inner_texts()

    def saved(self, button: str) -> pd.DataFrame:
        with self.page.expect_download() as download:
            self.page.click(button)
        return pd.read_csv(download.value.path())


def rows_of(found: Atlas, score: str) -> pd.DataFrame:
    rows = found.rows(score).reset_index(drop=True)
    return rows.assign(name=rows["layer"].astype(str) + "." + rows["head"].astype(str))


def test_pointing_at_a_head_shows_it_everywhere(browser: Any, one: Path, found: Atlas) -> None:
    page = Page(browser, one)
    assert page.maps.count() == 6
    best = rows_of(found, "ocr").sort_values("value", ascending=False).iloc[0]
    layer, head = int(best["layer"]), int(best["head"])
    page.hover(1, layer, head)
    assert page.heading() == f"Head {layer}.{head} language model"
    assert page.readout().startswith(f"head {layer}.{head} · OCR {best['value']:.3f} share [{best['low']:.3f}, ")
    assert all(page.edge(number, layer, head) == BLACK for number in range(6))
    assert page.page.locator("#table tbody tr.hover th").inner_text() == f"{layer}.{head}"
    assert page.page.locator("#table tfoot tr th").inner_text() == f"{layer}.{head}"
    # the card has the numbers of the table
    row = page.card()["OCR"]
    assert row[1] == f"{best['value']:.3f}" and row[3] == f"{best['null']:.3f}" and row[5:] == ["1", str(best["n"])]
    assert float(row[4]) == pytest.approx(best["p_holm"], rel=0.5)
    assert page.card()["entropy"][3:5] == ["–", "–"]
    # relatives: cosines of standardised scores
    wide = found.wide().drop(columns=["layer", "head"]).to_numpy()
    scaled = (wide - wide.mean(0)) / wide.std(0)
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    cosines = scaled @ scaled[layer * HEADS + head]
    expected = [f"{i // HEADS}.{i % HEADS} {cosines[i]:.2f}" for i in np.argsort(-cosines)[1:6]]
    assert page.page.locator("#card .heads button").all_inner_texts() == expected
    # pictures
    names = [p.name for p in made_up_pictures()]
    strongest = [s for s in found.strongest("ocr", layer, head, 12) if s in names][:3]
    links = page.page.locator("#card .gallery a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert links == [f"pictures/{name}.html#head={layer}.{head}" for name in strongest]
    page.page.mouse.move(2, 2)  # the card stays, to be read; outlines go
    assert page.heading() == f"Head {layer}.{head} language model" and page.edge(0, layer, head) != BLACK
    kin = page.page.locator("#card .heads button").nth(1)
    kin.hover()
    other = tuple(map(int, expected[1].split()[0].split(".")))
    assert page.edge(0, *other) == BLACK and page.heading() == f"Head {layer}.{head} language model"
    kin.click()
    assert page.heading() == f"Head {other[0]}.{other[1]} language model"
    page.check_quiet()


def test_a_click_pins_and_escape_lets_go(browser: Any, one: Path) -> None:
    page = Page(browser, one)
    page.click(0, 4, 3)
    page.page.mouse.move(2, 2)
    assert page.heading().startswith("Head 4.3") and all(page.edge(number, 4, 3) == ORANGE for number in range(6))
    page.hover(2, 9, 6)  # another one is shown while it is pointed at
    assert page.heading().startswith("Head 9.6") and page.edge(0, 9, 6) == BLACK and page.edge(0, 4, 3) == ORANGE
    page.page.mouse.move(2, 2)
    assert page.heading().startswith("Head 4.3")
    page.page.keyboard.press("Escape")
    assert "Point at a head" in page.page.inner_text("#card")
    page.page.locator("#table tbody tr").nth(2).locator("button").click()
    pinned = page.listed()[2]
    page.page.mouse.move(2, 2)
    assert page.heading().startswith(f"Head {pinned} ")
    page.check_quiet()


def test_the_keyboard_reaches_heads(browser: Any, one: Path) -> None:
    page = Page(browser, one)
    page.maps.first.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp"):
        page.page.keyboard.press(key)
    assert page.heading().startswith("Head 1.1")
    page.page.keyboard.press("Enter")
    page.page.keyboard.press("Tab")
    assert page.heading().startswith("Head 1.1") and page.page.inner_text("#pin") == "unpin"
    page.page.keyboard.press("Escape")
    page.page.locator("#tower input").first.focus()
    page.page.keyboard.press("ArrowRight")
    assert "heads of the vision tower by distance attended" in page.page.inner_text("#table-said")
    assert page.maps.count() == 5
    page.check_quiet()


def test_heads_that_do_one_thing_and_not_another(browser: Any, one: Path, found: Atlas) -> None:
    page = Page(browser, one)
    does, other = rows_of(found, "ocr"), rows_of(found, "image_from_answer")
    yes = (does["p_holm"] <= 0.05) & (does["value"] > does["null"])
    no = ~((other["p_holm"] <= 0.05) & (other["value"] > other["null"]))
    page.page.select_option("#does", "ocr")
    assert page.page.inner_text("#rule-said").startswith(
        f"{yes.sum()} of {LAYERS * HEADS} heads: OCR is above its null"
    )
    page.page.select_option("#doesnt", "image_from_answer")
    expected = pd.DataFrame(does[yes & no]).sort_values("value", ascending=False)["name"].tolist()
    assert 0 < len(expected) < yes.sum()
    listed = page.page.locator("#rule-heads button").evaluate_all("all => all.map(b => b.firstChild.textContent)")
    assert listed == expected == page.listed()
    assert "image attention, answer is not (p > 0.05, or not above)" in page.page.inner_text("#rule-said")
    dim, full = page.page.evaluate(
        """name => {
        const [map] = maps, [layer, head] = name.split(".").map(Number), chosen = layer * map.table.heads + head;
        return [state.selection.findIndex(one => !one), chosen].map(own => {
            const [x0, y0, x1, y1] = cellOf(map, own);
            return map.base.getContext("2d").getImageData((x0 + x1) / 2, (y0 + y1) / 2, 1, 1).data[3];
        }); }""",
        expected[0],
    )
    assert dim < 100 and full == 255
    saved = page.saved("#csv-selection")
    assert set(saved["layer"].astype(str) + "." + saved["head"].astype(str)) == set(expected)
    page.page.select_option("#doesnt-rule", "value")
    page.page.fill("#most", "0.3")
    expected = pd.DataFrame(does[yes & (other["value"] <= 0.3)]).sort_values("value", ascending=False)["name"].tolist()
    assert page.listed() == expected and "image attention, answer is 0.3 at most" in page.page.inner_text("#rule-said")
    page.page.fill("#most", "")  # no bound, and not 0
    assert page.listed() == pd.DataFrame(does[yes]).sort_values("value", ascending=False)["name"].tolist()
    assert "at most" not in page.page.inner_text("#rule-said")
    page.page.fill("#most", "0.3")
    page.page.fill("#least", "0.5")
    assert page.listed() == [name for name in expected if name in set(does["name"][does["value"] >= 0.5])]
    page.page.select_option("#doesnt", "entropy")  # which is not tested
    assert page.page.input_value("#doesnt-rule") == "value"
    assert page.page.locator("#does option[value=entropy]").count() == 0
    page.page.click("#clear")
    assert len(page.listed()) == 25 and page.page.evaluate("state.selection") is None
    page.check_quiet()


def test_heads_without_a_test_are_left_out_and_counted(browser: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((8, 1, 4)) + 1
    values[2:, 0, 2] = np.nan  # two stimuli: no test
    observed = {"ocr": Observed(tuple("abcdefgh"), values, np.zeros_like(values))}
    page = Page(browser, save_atlas_page(tmp_path / "page.html", Atlas("m", observed)))
    page.page.select_option("#does", "ocr")
    assert "3 of 4 heads: OCR" in page.page.inner_text("#rule-said")
    assert "Left out: 1 without a test of OCR" in page.page.inner_text("#rule-said")
    assert "0.2" not in page.listed() and len(page.listed()) == 3
    page.check_quiet()


def test_the_table_sorts_filters_and_leafs(browser: Any, one: Path, found: Atlas) -> None:
    page = Page(browser, one)
    rows = rows_of(found, "transfer")
    for ascending in (False, True):
        page.page.click("#table thead button[data-score=transfer]")
        order = rows.sort_values("value", ascending=ascending, kind="stable")["name"].tolist()
        assert page.listed() == order[:25]
        assert page.page.get_attribute("#table th:has([data-score=transfer])", "aria-sort") == (
            "ascending" if ascending else "descending"
        )
    page.page.click("#next")
    assert page.listed() == order[25:50] and "26 to 50 of 96" in page.page.inner_text("#page")
    page.page.fill("#search", "3.")
    assert sorted(page.listed()) == [f"3.{head}" for head in range(HEADS)]
    page.page.fill("#search", "3.1")
    assert page.listed() == ["3.1"]
    page.page.fill("#search", "")
    page.page.fill("#from", "2")
    page.page.fill("#to", "4")
    page.page.fill("#floor", "0")
    inside = rows[rows["layer"].between(2, 4) & (rows["value"] >= 0)]
    assert sorted(page.listed()) == sorted(inside["name"])
    page.page.click("#clear")
    page.page.check("#tested")
    strong = rows[(rows["p_holm"] <= 0.05) & (rows["value"] > 0)]
    listed, n = page.listed(), len(strong)
    assert set(listed) <= set(strong["name"]) and len(listed) == 25 < n  # the rest is on the next page
    assert f"1 to 25 of {n}" in page.page.inner_text("#page")
    page.check_quiet()


def test_the_scatter_says_the_rank_correlation_and_finds_heads(browser: Any, one: Path, found: Atlas) -> None:
    page = Page(browser, one)
    page.page.select_option("#across", "locality")
    page.page.select_option("#up", "entropy")
    rho, _ = stats.spearmanr(found.values("locality").ravel(), found.values("entropy").ravel())
    said = page.page.inner_text("#scatter-said")
    assert float(said.split()[3]) == pytest.approx(rho, rel=0.01) and "over 96 heads" in said
    x = found.values("locality").ravel()
    loneliest = int(x.argmax())
    spot = page.page.evaluate(f"scatter.places[{loneliest}].map(at => at / scatter.ratio)")
    page.page.locator("#scatter").hover(position={"x": spot[0], "y": spot[1]})
    assert page.heading().startswith(f"Head {loneliest // HEADS}.{loneliest % HEADS} ")
    assert all(page.edge(number, loneliest // HEADS, loneliest % HEADS) == BLACK for number in range(6))
    page.check_quiet()


def test_the_file_of_everything_is_the_table(browser: Any, one: Path, found: Atlas) -> None:
    page = Page(browser, one)
    saved = page.saved("#csv-all")
    pd.testing.assert_frame_equal(saved, found.table, check_dtype=False, rtol=1e-5, atol=1e-7)
    page.check_quiet()


def test_maps_are_chosen_and_definitions_shown(browser: Any, one: Path, found: Atlas) -> None:
    page = Page(browser, one)
    page.page.click("#choose summary")
    page.page.locator("#chips label", has_text="entropy").click()
    page.page.locator("#chips label", has_text="OCR").click()
    shown = page.page.locator("#maps figure").evaluate_all("all => all.map(f => f.dataset.score)")
    assert shown == ["text_retrieval", "localisation", "image_from_answer", "induction", "transfer", "entropy"]
    figure = page.page.locator("#maps figure[data-score=transfer]")
    figure.locator("summary").click()
    assert figure.locator("details p").first.inner_text() == BY_NAME["transfer"].formula + "."
    ticks = figure.locator(".ticks span").all_inner_texts()
    reach = np.abs(found.values("transfer")).max()
    assert [float(ticks[0]), ticks[1]] == [pytest.approx(-reach, rel=0.01), "0"] and ticks[2].endswith(" nats")
    page.page.select_option("#reach", "0.98")
    ticks = figure.locator(".ticks span").all_inner_texts()
    reach = np.quantile(np.abs(found.values("transfer")), 0.98, method="inverted_cdf")
    assert ticks[0].startswith("≤ -") and float(ticks[2][2:].split()[0]) == pytest.approx(reach, rel=0.01)
    page.page.locator("#maps .title[data-score=induction]").click()
    assert page.page.inner_text("#focus-name") == "induction"
    page.check_quiet()


def test_two_atlases_stand_side_by_side_with_their_differences(
    browser: Any, two: Path, found: Atlas, trained: Atlas
) -> None:
    page = Page(browser, two)
    compared = compare(found, trained).table
    assert page.maps.count() == 18 and page.page.locator("#maps .set").all_inner_texts()[:3] == ["A", "B", "B − A"]
    page.hover(1, 3, 5)
    assert all(page.edge(number, 3, 5) == BLACK for number in range(18))
    (change,) = compared.query("score == 'induction' and layer == 3 and head == 5").to_dict("records")
    cells = page.card()["induction"]
    assert [float(cell) for cell in cells[:3]] == pytest.approx(
        [change["a"], change["b"], change["difference"]], abs=0.006
    )
    assert float(cells[4]) == pytest.approx(change["p_holm"], rel=0.5) and cells[5] == str(change["n"])
    page.page.click("#set label:nth-of-type(3)")
    page.page.select_option("#does", "induction")
    assert page.listed() == ["3.5"] and "is above 0 (higher in B)" in page.page.inner_text("#rule-said")
    saved = page.saved("#csv-selection")
    assert saved["numbers"].unique().tolist() == ["B-A"]
    row = saved.set_index("score").loc["induction"]
    assert row["value"] == pytest.approx(change["difference"], rel=1e-5) and row["null"] == 0
    everything = page.saved("#csv-all")
    b = pd.DataFrame(everything[everything["numbers"] == "B"]).drop(columns="numbers").reset_index(drop=True)
    pd.testing.assert_frame_equal(b, trained.table, check_dtype=False, rtol=1e-5, atol=1e-6)
    page.check_quiet()


def test_models_of_other_shapes_stand_side_by_side_without(browser: Any, found: Atlas, tmp_path: Path) -> None:
    other = made_up_atlas("made-up/other", (5, 10), (6, 5), seed=3)
    page = Page(browser, save_atlas_page(tmp_path / "apart.html", found, other=other))
    assert "Heads of the language model do not correspond" in page.page.inner_text("header")
    assert page.maps.count() == 12 and page.page.locator("#set input").nth(2).is_disabled()
    page.hover(1, 4, 9, (5, 10))
    assert page.heading() == "Head 4.9 language model of B"
    assert page.edge(0, 4, 7) != BLACK and float(page.card()["OCR"][1]) == pytest.approx(
        other.values("ocr")[4, 9], abs=0.002
    )
    page.page.click("#set label:nth-of-type(2)")
    assert "of 50 heads of the language model" in page.page.inner_text("#table-said")
    page.page.click("#tower label:nth-of-type(2)")
    page.page.click("#set label:nth-of-type(3)")
    assert page.maps.count() == 15 and "of 30 heads of the vision tower" in page.page.inner_text("#table-said")
    page.page.click("#tower label:nth-of-type(1)")  # which has no differences
    assert page.page.locator("#set input").nth(0).is_checked()
    page.check_quiet()


@pytest.mark.parametrize("first", [True, False])
def test_a_tower_that_one_model_lacks_is_shown_of_the_other(
    browser: Any, found: Atlas, tmp_path: Path, first: bool
) -> None:
    blind = made_up_atlas("made-up/blind", (LAYERS, HEADS), None)
    pair = (found, blind) if first else (blind, found)
    page = Page(browser, save_atlas_page(tmp_path / "page.html", pair[0], other=pair[1]))
    page.page.click("#set label:nth-of-type(3)")
    page.page.click("#tower label:nth-of-type(2)")
    assert page.maps.count() == 5 and page.page.locator("#set input:not([disabled])").count() == 1
    page.hover(0, 3, 2, (6, 5))
    assert page.heading() == f"Head 3.2 vision tower of {'A' if first else 'B'}"
    assert float(page.card()["distance attended"][1]) == pytest.approx(found.values("distance")[3, 2], abs=0.006)
    page.check_quiet()


def test_a_head_without_a_value_comes_last(browser: Any, tmp_path: Path) -> None:
    def lose(name: str, values: np.ndarray) -> None:
        values[:, 1, 2] = np.nan

    path = save_atlas_page(tmp_path / "page.html", made_up_atlas(language=(3, 4), vision=None, edit=lose))
    page = Page(browser, path)
    for _ in range(2):  # in both directions
        assert page.listed()[-1] == "1.2" and len(page.listed()) == 12
        page.page.click("#table thead button[data-score=ocr]")
    page.hover(0, 1, 2, (3, 4))
    cells = page.card()["OCR"]
    assert {cells[1], cells[2], cells[4], cells[5]} == {"–"} and cells[6] == "0"
    page.check_quiet()


def test_hostile_names_are_shown_as_text(browser: Any, found: Atlas, tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    pictures = [Picture(f"page-{i}", Image.new("RGB", (30, 20)), hostile, f"{hostile}.html") for i in range(3)]
    path = save_atlas_page(tmp_path / "hostile.html", Atlas(hostile, found.observed, {hostile: hostile}), pictures)
    page = Page(browser, path)
    page.click(0, 4, 3)
    assert hostile in page.page.inner_text("header")
    assert page.page.locator("#card .caption").all_inner_texts() == [hostile] * 3
    assert page.page.locator("img[src=x]").count() == 0
    page.check_quiet()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser: Any, one: Path, two: Path, scheme: str) -> None:
    for path in (one, two):
        page = Page(browser, path, PHONE, scheme)
        page.click(0, 4, 3)
        page.page.select_option("#does", "ocr")
        page.page.select_option("#doesnt", "image_from_answer")
        page.page.click("#choose summary")
        for details in page.page.locator("details.definition").all()[:3]:
            details.locator("summary").click()
        assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        paper = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(23, 24, 26)")
        page.check_quiet()


def test_a_large_page_answers_at_once(browser: Any, tmp_path: Path) -> None:
    """784 heads, layout included, in time of the processor: others use the machine."""
    path = save_atlas_page(tmp_path / "large.html", made_up_atlas(), made_up_pictures())
    page = Page(browser, path)
    actions = {
        "hover": "i => mark({ group: 0, head: 37 * i })",
        "click": "i => pin({ group: 0, head: 37 * i })",
        "sort": "i => focusOn(current().scores[i])",
        "rule": "i => { at('does').value = current().scores[i]; at('does').dispatchEvent(new Event('input')); }",
        "filter": "i => { at('search').value = i + '.'; at('search').dispatchEvent(new Event('input')); }",
        "scatter": "i => { at('up').value = current().scores[i]; at('up').dispatchEvent(new Event('change')); }",
    }
    session = page.page.context.new_cdp_session(page.page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def spent() -> float:
        """Milliseconds that the page's thread has worked."""
        metrics = session.send("Performance.getMetrics")["metrics"]
        return 1000 * next(own["value"] for own in metrics if own["name"] == "TaskDuration")

    for name, action in actions.items():
        before = spent()
        times = page.page.evaluate(
            f"""() => [1, 2, 3, 4, 5, 6, 7].map(i => {{ const start = performance.now(); ({action})(i);
            document.body.offsetHeight; return performance.now() - start; }})"""
        )
        each = (spent() - before) / len(times)
        print(f"{name}: {each:.0f} ms of the processor, {min(times):.0f} to {max(times):.0f} ms by the clock")
        assert min(each, np.median(times)) < SOON
    page.check_quiet()
