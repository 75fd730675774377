"""The page in a real browser."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import viewing
from PIL import Image
from viewing import DESKTOP, PHONE, photograph

from hooked_vlm import HookedVLM, viewer
from hooked_vlm.inputs.layouts import whole_layout
from hooked_vlm.toys.pages import make_page
from hooked_vlm.viewer.scene import Panel, Scene
from hooked_vlm.viewer.view import Chip, view_of

pytestmark = pytest.mark.slow

QUESTIONED, BOX = 2, (63, 56, 96, 68)
"""The line that is asked for, and where its value is written."""
SAID = r"layer 2, head 1 · largest ([\d.]+) at image 0, token (\d+) · on images ([\d.]+)%"
KEYS = {
    "n": "layer 2, head 0",
    "p": "layer 2, head 1",
    "ArrowUp": "layer 3, head 1",
    "ArrowDown": "layer 2, head 1",
    ".": "layer 2, head 2",
    ",": "layer 2, head 1",
    "m": "layer 2, mean of all heads",
    "x": "layer 2, largest of all heads",
}


class Opened(viewing.Opened):
    """A page of the viewer."""

    def colours(self, spots: list[tuple[float, float]], panel: int = 0) -> list[list[int]]:
        """Red, green and blue of the canvas at shares of its width and height."""
        return self.page.evaluate(
            """([panel, spots]) => {
            const canvas = document.querySelectorAll("#panels canvas")[panel];
            const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return spots.map(([x, y]) => {
                const at = 4 * (Math.floor(y * height) * width + Math.floor(x * width));
                return [...data.slice(at, at + 3)];
            }); }""",
            [panel, spots],
        )


def made(family: str, size: tuple[int, int] = (128, 112)) -> tuple[Any, Any, Any]:
    model = HookedVLM.from_pretrained(family)
    page = make_page(np.random.default_rng(7), n_lines=4, size=size)
    return model, page, model.to_inputs(page.question(QUESTIONED), images=page.image)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    model, page, inputs = made("toy-qwen2-vl")
    whole = inputs.append(page.lines[QUESTIONED].value)
    view = viewer.attention(
        model, whole, heads=[(2, 1), (2, 0)], boxes=[page.lines[QUESTIONED].value_box], images=page.image
    )
    return view.save(tmp_path_factory.mktemp("pages") / "attention.html"), model, whole


def test_a_click_on_a_token_shows_where_its_pattern_looks(browser: Any, toy: tuple[Path, Any, Any]) -> None:
    path, model, inputs = toy
    _, cache = model.run_with_cache(inputs)
    opened = Opened(browser, path, DESKTOP)
    grid = inputs.image_grid(0)
    evidence = grid.tokens_in_box(BOX, 0.1)
    opened.page.uncheck("#evidence")
    for token in range(4):
        opened.page.click(f"button.chip[data-row='{token}']")
        opened.page.wait_for_selector(f"button.chip[data-row='{token}'][aria-pressed=true]")
        pattern = cache["pattern", 2][0, 1, inputs.shape[1] - 5 + token, inputs.image_tokens(0)].numpy()
        best, largest = int(pattern.argmax()), float(pattern.max())
        said = re.search(
            r"layer 2, head 1 · largest ([\d.]+) at image 0, token (\d+) · on images ([\d.]+)%", opened.readout()
        )
        assert said, opened.readout()
        if token:  # for the first character it looks just before the value
            assert best in evidence
        assert int(said[2]) == best and abs(float(said[1]) - largest) < 0.003
        assert abs(float(said[3]) / 100 - pattern.sum()) < 0.002
        # the brightest box of the picture is the token's, and only those the pattern names are coloured
        centres = [grid.box_of(i) for i in range(grid.n_tokens)]
        spots = [((x0 + x1) / 256, (y0 + y1) / 224) for x0, y0, x1, y1 in centres]
        colourful = [max(c) - min(c) for c in opened.colours(spots)]
        assert int(np.argmax(colourful)) == best
        assert all(amount < 12 for amount, share in zip(colourful, pattern / largest, strict=True) if share < 0.02)
        x0, y0, x1, y1 = centres[best]
        near = [((x0 + 0.3) / 128, (y0 + 0.3) / 112), ((x1 - 0.3) / 128, (y1 - 0.3) / 112)]
        assert all(max(c) - min(c) > 50 for c in opened.colours(near))
    opened.check_quiet()


def test_hovering_names_the_token_its_value_and_its_pixels(browser: Any, toy: tuple[Path, Any, Any]) -> None:
    path, _, inputs = toy
    opened = Opened(browser, path, DESKTOP)
    frame = opened.page.locator("#panels canvas").bounding_box()
    x0, y0, x1, y1 = inputs.image_grid(0).box_of(27)
    opened.page.mouse.move(frame["x"] + frame["width"] * 56 / 128, frame["y"] + frame["height"] * 56 / 112)
    said = opened.page.inner_text("#pointed")
    assert said.startswith("image 0, token 27: 0.99") and f"x {x0:g} to {x1:g}, y {y0:g} to {y1:g}" in said
    opened.check_quiet()


def test_keys_reach_everything_and_answer_at_once(browser: Any, toy: tuple[Path, Any, Any]) -> None:
    opened = Opened(browser, toy[0], DESKTOP)
    for key, words in KEYS.items():
        opened.page.keyboard.press(key)
        assert words in opened.readout()
    before = opened.readout()
    opened.page.keyboard.press("ArrowRight")
    opened.page.wait_for_selector("button.chip[data-row='1'][aria-pressed=true]")
    assert opened.readout() != before
    assert opened.page.locator("#heads button").count() == 4
    opened.page.keyboard.press("s")
    assert opened.page.input_value("#common") == "layer"
    opened.page.locator("#heads button").nth(2).click()
    assert "head 2" in opened.readout()
    opened.check_quiet()


def test_the_address_names_the_first_head(browser: Any, toy: tuple[Path, Any, Any]) -> None:
    opened = Opened(browser, toy[0], DESKTOP, address="#head=3.2")
    assert "layer 3, head 2 ·" in opened.readout()
    opened.page.evaluate("location.hash = '#head=0.3'")
    opened.page.get_by_text("layer 0, head 3 ·").wait_for()
    for nothing in ("#head=99.0", "#head=1", "#row", ""):
        assert "layer 2, head 1 ·" in Opened(browser, toy[0], DESKTOP, address=nothing).readout()
    opened.check_quiet()


def test_the_text_shows_the_weights_of_the_pattern(browser: Any, toy: tuple[Path, Any, Any]) -> None:
    """Each text token is as opaque as its weight, by the largest of text and picture; the largest are named."""
    path, model, inputs = toy
    _, cache = model.run_with_cache(inputs)
    opened = Opened(browser, path, DESKTOP)
    image = inputs.image_tokens(0)
    text = [pos for pos in range(inputs.shape[1]) if pos not in image]
    question = inputs.positions.question[0].tolist()
    for pos, layer, head in ((inputs.shape[1] - 1, 0, 2), (question[-2], 1, 3), (question[0], 2, 1)):
        opened.page.select_option("#layer", str(layer))
        opened.page.select_option("#head", str(head))
        chip = opened.page.locator("#chips .chip:not(.image)").nth(text.index(pos))
        chip.click()
        opened.page.locator("#text-said").hover()
        pattern = cache["pattern", layer][0, head, pos - 1]
        shares = opened.page.evaluate(
            """[...document.querySelectorAll('#chips .chip:not(.image)')]
            .map(chip => Number(chip.style.getPropertyValue('--share')))"""
        )
        np.testing.assert_allclose(shares, pattern[text] / pattern.max(), atol=0.005)
        best = max(text, key=lambda at: float(pattern[at]))
        said = opened.page.inner_text("#text-said")
        token = model.to_string([int(inputs.tokens[0, best])]).replace("\n", "⏎")
        found = re.search(r"attends in the text to “(.*?)” ([\d.e-]+)", said)
        assert found and found[1].strip() == token.strip() and abs(float(found[2]) - float(pattern[best])) < 0.005
    opened.check_quiet()


def test_arrows_go_through_the_tokens_as_they_are_read(browser: Any, toy: tuple[Path, Any, Any]) -> None:
    opened = Opened(browser, toy[0], DESKTOP)
    pressed = opened.page.locator("button.chip[aria-pressed=true]")
    assert pressed.inner_text() == "4" and "answer" in pressed.get_attribute("class")
    opened.page.keyboard.press("ArrowLeft")
    opened.page.wait_for_selector("button.chip.prompt[aria-pressed=true]")
    assert pressed.inner_text() == "⏎"
    opened.page.keyboard.press("ArrowLeft")
    opened.page.get_by_text("“assistant”, layer 2").wait_for()
    opened.check_quiet()


@pytest.mark.parametrize("family", ["toy-qwen2-vl", "toy-internvl2"])
def test_pictures_are_saved_at_their_width_on_paper(browser: Any, tmp_path: Path, family: str) -> None:
    model, page, inputs = made(family, (256, 128))
    view = viewer.attention(model, inputs, page.lines[QUESTIONED].value, [(2, 1)], images=page.image)
    opened = Opened(browser, view.save(tmp_path / "page.html"), DESKTOP)
    for inches in ("3.25", "6.75"):
        opened.page.select_option("#paper", inches)
        for kind in ("png", "svg"):
            with opened.page.expect_download() as saved:
                opened.page.click(f"#save-{kind}")
            assert saved.value.suggested_filename == f"attention-4-layer-2-head-1.{kind}"
            saved.value.save_as(tmp_path / f"{inches}.{kind}")
        with Image.open(tmp_path / f"{inches}.png") as picture:
            assert picture.width == float(inches) * 300
            assert [round(dots) for dots in picture.info["dpi"]] == [300, 300]
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 50
    root = ElementTree.parse(tmp_path / "3.25.svg").getroot()
    space = {"svg": "http://www.w3.org/2000/svg"}
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("width") == "3.25in"
    texts = [text.text for text in root.iterfind(".//svg:text", space)]
    assert texts[0] == "“4”, layer 2, head 1" and str(texts[-1]).endswith(" attention")
    assert len(root.findall(".//svg:image", space)) == len(view.scene.panels)
    # the boxes that are drawn are those of the tokens with weight, as opaque as their share of the largest
    whole = inputs.append(page.lines[QUESTIONED].value)
    pattern = model.run_with_cache(whole)[1]["pattern", 2][0, 1, inputs.shape[1] - 1, inputs.image_tokens(0)].numpy()
    boxes = {}
    for rect in root.iterfind(".//svg:rect[@fill-opacity]", space):
        corner = tuple(float(rect.get(name) or "") for name in ("x", "y"))
        boxes.setdefault(corner, []).append(float(rect.get("fill-opacity") or ""))
    for panel in view.scene.panels:
        for token, box in zip(panel.tokens, panel.boxes, strict=True):
            share = 0.75 * pattern[token] / pattern.max()
            drawn = boxes.get((float(box[0]), float(box[1])), [])
            assert share < 0.005 or any(abs(opacity - share) < 0.005 for opacity in drawn)
    opened.check_quiet()


def test_a_notebooks_frame_shows_the_page(browser: Any, tmp_path: Path) -> None:
    _, page, inputs = made("toy-qwen2-vl")
    view = viewer.values(inputs, np.arange(56, dtype=np.float32), images=page.image)
    notebook = browser.new_page()
    notebook.set_content(f"<h1>cell</h1>{view._repr_html_()}")
    notebook.frame_locator("iframe").locator("body[data-ready]").wait_for()
    assert "largest 55 at image 0, token 55" in notebook.frame_locator("iframe").locator("#readout").inner_text()


def test_it_fits_a_phone_in_the_dark(browser: Any, toy: tuple[Path, Any, Any], tmp_path: Path) -> None:
    opened = Opened(browser, toy[0], PHONE, "dark")
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ink, paper = opened.page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert sum(map(int, re.findall(r"\d+", ink))) > 600 and sum(map(int, re.findall(r"\d+", paper))) < 150
    photograph(opened.page, "viewer-phone.png", tmp_path)
    opened.check_quiet()
    opened = Opened(browser, toy[0], DESKTOP)
    opened.page.click("button.chip[data-row='1']")
    opened.page.wait_for_selector("button.chip[data-row='1'][aria-pressed=true]")
    photograph(opened.page, "viewer.png", tmp_path)
    opened.check_quiet()


def test_tiles_and_thumbnail_and_the_vision_tower(browser: Any, tmp_path: Path) -> None:
    model, page, inputs = made("toy-internvl2", (256, 128))
    view = viewer.attention(model, inputs, boxes=[page.lines[QUESTIONED].value_box], images=page.image)
    opened = Opened(browser, view.save(tmp_path / "tiles.html"), DESKTOP)
    assert opened.page.locator("figcaption").all_inner_texts() == ["image 0, tiles", "image 0, thumbnail"]
    photograph(opened.page, "viewer-tiles.png", tmp_path)
    opened.check_quiet()
    patches = viewer.vision_attention(model, inputs, images=page.image)
    opened = Opened(browser, patches.save(tmp_path / "patches.html"), DESKTOP)
    opened.page.locator("#panels canvas").nth(1).click(position={"x": 3, "y": 3})
    assert opened.readout().startswith("“patch 512”") and "image 0, thumbnail, patch" in opened.readout()
    assert "token" not in opened.page.inner_text("body")
    opened.page.keyboard.press("m")
    assert "on class token" in opened.readout()
    opened.check_quiet()


def test_signed_values_have_zero_in_the_middle(browser: Any, tmp_path: Path) -> None:
    _, page, inputs = made("toy-qwen2-vl")
    numbers = np.zeros(56, np.float32)
    numbers[[0, 1, 2]] = [-2, 2, np.nan]
    view = viewer.values(inputs, numbers, quantity="effect", images=page.image)
    opened = Opened(browser, view.save(tmp_path / "values.html"), DESKTOP)
    assert opened.page.locator("#ticks span").all_inner_texts() == ["-2", "0", "2 effect"]
    (r0, _, b0), (r1, _, b1), clear, zero = opened.colours([((8 + 16 * i) / 128, 8 / 112) for i in range(4)])
    assert b0 > r0 + 40 and r1 > b1 + 40
    assert max(clear) - min(clear) < 4 and max(zero) - min(zero) < 4
    opened.check_quiet()


def test_a_browser_that_cannot_decompress_says_so(browser: Any, toy: tuple[Path, Any, Any]) -> None:
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(toy[0].as_uri())
    page.wait_for_selector("#warning:not([hidden])")
    assert "cannot decompress" in page.inner_text("#warning")


def test_a_large_page_answers_a_click_at_once(browser: Any, tmp_path: Path) -> None:
    """28 x 28 heads of 1,024 tokens: the work of a click is bounded by what it draws, one layer of one row."""
    grid = whole_layout((896, 896), (1, 64, 64))
    panel = Panel("image 0", 0, np.arange(1024), grid.boxes)
    scene = Scene((Image.new("RGB", (896, 896), "white"),), (panel,), ((),), (), 1024)
    scores = np.random.default_rng(0).standard_normal((3, 28, 28, 1024), np.float32)
    chips = [Chip(text, "answer", row) for row, text in enumerate("abc")]
    view = view_of(scene, np.exp(2 * scores), chips, range(28), range(28), title="", note="", quantity="attention")
    opened = Opened(browser, view.save(tmp_path / "large.html"), DESKTOP)
    assert opened.page.locator("#heads canvas").count() == 28
    for change in ("{ row: 1 }", "{ row: 2, layer: 5 }", "{ head: 3 }"):
        spent = opened.page.evaluate(f"(s => show({change}).then(() => performance.now() - s))(performance.now())")
        print(f"{change}: {spent:.0f} ms")
    assert opened.readout().startswith("“c”, layer 5, head 3 · largest")
    opened.check_quiet()
