"""The served page in a real browser, started by the command as a user starts it."""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from viewing import DESKTOP, PHONE, photograph

from hooked_vlm import HookedVLM, viewer
from hooked_vlm.interventions import Compose, ScaleHeads, ZeroHeads
from hooked_vlm.toys.pages import make_page

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("browser")]

EDITS = Compose((ZeroHeads(((2, 0), (2, 1))), ScaleHeads(((1, 3),), 0.5)))


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """The address of a page that the command serves; a terminal's Ctrl-C ends it."""
    pytest.importorskip("nicegui", reason="NiceGUI is not installed")
    command = [sys.executable, "-m", "hooked_vlm.cli", "view", "--serve", "--no-open", "--max-new-tokens", "8"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            address = re.fullmatch(r"page: (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", said)
            assert address, said or process.communicate(timeout=60)[1]
            yield address[1]
            process.send_signal(signal.SIGINT)
            _, complaints = process.communicate(timeout=60)
            assert complaints.strip() == "hooked-vlm: interrupted"
        finally:
            process.kill()


class Opened:
    """A tab, with everything it complained of, or asked of others."""

    def __init__(self, browser: Any, address: str, size: dict[str, int], scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._asks(request.url, ("data:", "blob:", address)))
        self.page.on("websocket", lambda socket: self._asks(socket.url, (address.replace("http:", "ws:"),)))
        self.page.goto(address)
        self.page.wait_for_selector(".head-grid")

    def _asks(self, url: str, own: tuple[str, ...]) -> None:
        if not url.startswith(own):
            self.elsewhere.append(url)

    def upload(self, name: str, content: bytes) -> None:
        self.page.set_input_files("input[type=file]", {"name": name, "mimeType": "image/png", "buffer": content})

    def choose(self, head: str, look: str) -> None:
        self.page.click(f"[data-head='{head}']")
        self.page.wait_for_selector(f"[data-head='{head}'].{look}")

    def generate(self) -> list[str]:
        """Both answers, when the attention is there as well."""
        before = self.page.locator("iframe").get_attribute("src") if self.page.locator("iframe").count() else ""
        self.page.click("button.run")
        self.page.wait_for_selector(f"iframe:not([src='{before}'])")
        self.page.wait_for_selector("button.run:not([disabled])")
        self.page.frame_locator("iframe").locator("body[data-ready]").wait_for()
        return self.page.locator(".answer-text").all_inner_texts()

    def check_quiet(self) -> None:
        assert (self.complaints, self.elsewhere) == ([], [])


def png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_picture_is_changed_heads_are_edited_and_the_model_answers(browser: Any, served: str, tmp_path: Path) -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    page = make_page(np.random.default_rng(3), n_lines=3)
    inputs = model.to_inputs(page.question(1), images=page.image)
    hooks = EDITS.hooks(model, inputs)
    unedited = model.generate(inputs, 8, return_type="str")
    edited = model.generate(inputs, 8, fwd_hooks=hooks, return_type="str")
    assert unedited == page.lines[1].value != edited

    opened = Opened(browser, served, {**DESKTOP, "height": 980})
    opened.upload("three lines.png", png(page.image))
    opened.page.get_by_text("three lines.png, 128 × 112 pixels").wait_for()
    opened.page.get_by_label("Prompt").fill(page.question(1))
    opened.choose("2.1", "masked")
    opened.choose("2.0", "masked")
    opened.page.get_by_label("Factor").fill("0.5")
    opened.choose("1.3", "scaled")
    opened.choose("0.0", "scaled")
    opened.choose("0.0", "kept")  # a second click takes it back
    assert opened.generate() == [unedited, edited]
    edits = "1.3 × 0.5, 2.0 × 0, 2.1 × 0"
    settings = opened.page.locator(".asked").inner_text()
    assert settings == f"Of three lines.png · “{page.question(1)}” · at most 8 tokens · {edits}"
    photograph(opened.page, "viewer-served.png", tmp_path)

    frame = opened.page.frame_locator("iframe")
    view = viewer.attention(model, inputs, edited, images=page.image, fwd_hooks=hooks)
    assert frame.locator("h1").inner_text() == f"Where the model looks: {edits}"
    _, cache = model.run_with_cache(inputs)  # layer 1 sees no edit before it
    row = cache["pattern", 1][0, 2, -1, inputs.image_tokens(0)]
    frame.locator("#layer").select_option("1")
    frame.locator("#head").select_option("2")
    said = re.search(
        r"layer 1, head 2 · largest ([\d.]+) at image 0, token (\d+)", frame.locator("#readout").inner_text()
    )
    assert said and int(said[2]) == int(row.argmax()) and abs(float(said[1]) - float(row.max())) < 0.003
    chips = [chip.text for chip in view.chips if chip.kind == "answer"]
    assert frame.locator("button.chip.answer").all_inner_texts()[: len(chips)] == chips
    opened.check_quiet()


def test_it_opens_with_the_answer(browser: Any, served: str) -> None:
    opened = Opened(browser, served, DESKTOP)
    frame = opened.page.frame_locator("iframe")
    frame.locator("body[data-ready]").wait_for()
    page = make_page(np.random.default_rng(7), n_lines=4)
    answer = page.lines[2].value
    assert opened.page.locator(".answer-text").all_inner_texts() == [answer, answer]
    assert frame.locator("dd").all_inner_texts() == ["toy-qwen2-vl", page.question(2), answer]
    assert not opened.page.get_by_text("The settings above have changed since").is_visible()
    with opened.page.expect_download() as saved:
        frame.locator("#save-svg").click()
    assert saved.value.suggested_filename.endswith(".svg")
    opened.check_quiet()


def test_a_result_of_other_settings_is_told_apart(browser: Any, served: str) -> None:
    opened = Opened(browser, served, DESKTOP)
    first = opened.generate()
    old = opened.page.get_by_text("The settings above have changed since")
    assert not old.is_visible() and first[0] == first[1]
    opened.choose("2.1", "masked")
    old.wait_for()
    opened.choose("2.1", "kept")
    old.wait_for(state="hidden")
    opened.page.get_by_label("all heads of layer 2").click()
    opened.page.wait_for_selector("[data-head='2.3'].masked")
    old.wait_for()
    assert opened.generate()[1] != first[1] and not old.is_visible()
    opened.page.get_by_label("Factor").fill("0.125")
    opened.choose("1.0", "scaled")
    assert opened.page.inner_text("[data-head='1.0']") == "×"  # the number is too long for its cell
    opened.page.get_by_label("layer 1, head 0: times 0.125").wait_for()
    opened.page.get_by_text("Keep all heads").click()
    old.wait_for()
    assert opened.page.locator(".head-grid .masked").count() == 0
    assert opened.generate() == first
    opened.check_quiet()


def test_mistakes_are_a_line_in_the_page(browser: Any, served: str) -> None:
    opened = Opened(browser, served, DESKTOP)
    error = opened.page.get_by_role("alert")
    for content, words in (
        (b"no picture", "Pillow"),
        (b"", "0 bytes"),
        (png(make_page(np.random.default_rng(0)).image)[:1500], "truncated"),
    ):
        opened.upload("file.png", content)
        opened.page.get_by_role("alert").filter(has_text=words).wait_for()
        assert "\n" not in error.inner_text()
    assert opened.page.get_by_text("example, 128 × 112 pixels").is_visible()  # the picture is still the one before
    opened.page.get_by_label("Prompt").fill("")
    opened.page.click("button.run")
    error.filter(has_text="prompt").wait_for()
    opened.page.get_by_label("Prompt").fill("<img src=x onerror=alert(1)>")
    assert len(opened.generate()) == 2
    assert not error.is_visible() and "<img src=x" in opened.page.locator(".asked").inner_text()
    opened.check_quiet()


def test_it_fits_a_phone_in_the_dark_and_the_keyboard_reaches_it(browser: Any, served: str, tmp_path: Path) -> None:
    opened = Opened(browser, served, PHONE, "dark")
    with opened.page.expect_file_chooser():
        opened.page.get_by_role("button", name="Choose a picture").focus()
        opened.page.keyboard.press("Enter")
    opened.page.get_by_role("button", name="Keep all heads").focus()
    for key in ("Tab", "ArrowDown", "ArrowDown", "ArrowRight", "Enter"):
        opened.page.keyboard.press(key)
    opened.page.wait_for_selector("[data-head='2.1'].masked:focus")
    assert opened.page.get_by_label("layer 2, head 1: masked").get_attribute("aria-pressed") == "true"
    opened.page.keyboard.press("Tab")
    opened.page.keyboard.press("Enter")
    opened.page.frame_locator("iframe").locator("body[data-ready]").wait_for()
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ink, paper = opened.page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert sum(map(int, re.findall(r"\d+", ink))) > 600 and sum(map(int, re.findall(r"\d+", paper))) < 150
    opened.check_quiet()


def test_other_pages_cannot_speak_to_it(browser: Any, served: str) -> None:
    stranger = browser.new_page()
    address = f"{served.replace('http:', 'ws:')}_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    outcome = stranger.evaluate(
        """url => new Promise(done => {
        const socket = new WebSocket(url);
        socket.onopen = () => done("open");
        socket.onerror = () => done("refused"); })""",
        address,
    )
    assert outcome == "refused"
    request = stranger.context.request
    assert request.get(served).status == 200
    assert request.get(served, headers={"Host": "evil.example"}).status == 403
    assert request.post(served, headers={"Origin": "http://evil.example"}).status == 403
    assert request.get(f"{served}attention/guess").status == 404
