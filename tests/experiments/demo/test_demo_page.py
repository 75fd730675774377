"""The demo's page in a real browser: slider, characters, random pairs, keys; both widths, both schemes."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import browser
from families import bundled
from pages import ROOT
from viewing import DESKTOP, photograph

from hooked_vlm import cli
from hooked_vlm.experiments.demo import Demo, DemoConfig, run
from hooked_vlm.experiments.demo.story import lines
from hooked_vlm.experiments.demo.turning import FACTORS

__all__ = ["browser"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """What `make demo` shows."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hooked-vlm", "demo", "--out", str(out), "--quiet"])
        cli.main()
    return run(DemoConfig(out=out, quiet=True), bundled("toy-qwen2-vl"))


class Opened:
    """The page, with everything it complained of or asked the network for."""

    def __init__(self, browser: Any, demo: Demo, size: dict[str, int], scheme: str = "light") -> None:
        self.said: list[str] = []
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", self._asked)
        self.page.goto(demo.page.as_uri())
        self.page.wait_for_selector("body[data-ready]")

    def _heard(self, message: Any) -> None:
        if "willReadFrequently" not in message.text:  # advice on how these tests read the canvas
            self.said.append(message.text)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.said.append(request.url)

    def answer(self) -> list[str]:
        return self.page.locator(".char b").all_inner_texts()

    def slide(self, step: int) -> None:
        self.page.locator("#strength").fill(str(step))

    def painted(self, head: int, spots: list[tuple[float, float]]) -> np.ndarray:
        """How colourful a head's map is at shares of its width and height."""
        colours = self.page.evaluate(
            """([head, spots]) => {
            const canvas = document.getElementById(`map-${head}`), pen = canvas.getContext("2d");
            const at = (x, y) => pen.getImageData(x * canvas.width, y * canvas.height, 1, 1).data;
            return spots.map(([x, y]) => [...at(x, y).slice(0, 3)]);
            }""",
            [head, spots],
        )
        return np.ptp(np.array(colours), axis=-1)


def test_the_slider_types_what_the_model_answered_at_every_strength(browser: Any, demo: Demo) -> None:
    opened = Opened(browser, demo, DESKTOP)
    assert "".join(opened.answer()) == demo.example.answer
    for step in (10, 5, 2, 1, 0):
        opened.slide(step)
        reply = demo.reading.replies[step]
        assert tuple(opened.answer()) == reply.tokens
        shares = opened.page.locator(".char small").all_inner_texts()
        for said, p in zip(shares, reply.probabilities, strict=True):
            assert said in (">99%", "<1%", "100%") or abs(float(said[:-1]) / 100 - p) < 0.0051
        wrong = opened.page.locator(".char.wrong b").count()
        assert wrong == sum(a != b for a, b in zip(reply.tokens, demo.example.answer, strict=True))
        assert f"at {round(100 * FACTORS[step])}%: {'right' if not wrong else 'wrong'}" in opened.page.inner_text(
            "#said"
        )
    assert opened.said == []


def test_each_character_shows_where_both_heads_look(browser: Any, demo: Demo) -> None:
    opened = Opened(browser, demo, DESKTOP)
    reply, (panel,) = demo.reading.replies[-1], demo.scene.panels
    for at in range(len(reply.tokens)):
        opened.page.locator(".char").nth(at).click()
        assert opened.page.locator(".char[aria-pressed=true]").get_attribute("data-at") == str(at)
        for head in range(2):
            weights = reply.attention[head, at][panel.tokens]
            corners = [[(x0 + 1, y0 + 1), (x1 - 1, y0 + 1), (x0 + 1, y1 - 1)] for x0, y0, x1, y1 in panel.boxes]
            painted = opened.painted(head, (np.array(corners).reshape(-1, 2) / demo.scene.pictures[0].size).tolist())
            seen = np.median(painted.reshape(-1, 3), axis=1)  # of three corners: ink and frame may lie on one
            assert seen.argmax() == weights.argmax() and (seen[weights < 0.02] < 12).all()
            said = opened.page.inner_text(f"#reading-{head}")
            assert abs(float(said.split("%")[0].split()[-1].strip("<>")) / 100 - weights.max()) < 0.011
    assert opened.said == []


def test_random_heads_are_turned_down_instead(browser: Any, demo: Demo) -> None:
    opened = Opened(browser, demo, DESKTOP)
    opened.slide(0)
    opened.page.locator("input[value=random]").check()
    assert tuple(opened.answer()) == demo.random[0].replies[0].tokens
    assert opened.page.locator(".dot").count() == opened.page.locator("#pair option").count() == len(demo.random)
    opened.page.locator("#pair").select_option("7")
    assert tuple(opened.answer()) == demo.random[6].replies[0].tokens
    opened.page.locator(".dot[data-pair='3']").dispatch_event("click")
    assert tuple(opened.answer()) == demo.random[2].replies[0].tokens
    names = " and ".join(f"{layer}.{head}" for layer, head in demo.random[2].heads)
    assert names in opened.page.inner_text("#said")
    assert opened.said == []


def test_keys_reach_everything(browser: Any, demo: Demo) -> None:
    opened = Opened(browser, demo, DESKTOP)
    before = opened.page.locator(".char[aria-pressed=true]").get_attribute("data-at")
    opened.page.keyboard.press("ArrowRight")
    assert opened.page.locator(".char[aria-pressed=true]").get_attribute("data-at") != before
    for _ in range(12):
        opened.page.keyboard.press("ArrowDown")
    assert tuple(opened.answer()) == demo.reading.replies[0].tokens
    opened.page.keyboard.press("r")
    assert tuple(opened.answer()) == demo.random[0].replies[0].tokens
    opened.page.keyboard.press("r")
    opened.page.keyboard.press(" ")  # up again, by itself
    opened.page.wait_for_selector("#strength[aria-valuetext='100%']")
    assert "".join(opened.answer()) == demo.example.answer
    opened.page.focus("#strength")  # as after a pull at the slider
    opened.page.keyboard.press("r")
    assert opened.page.is_checked("input[value=random]")
    opened.page.keyboard.press("r")
    assert opened.page.is_checked("input[value=reading]")
    opened.page.keyboard.press("ArrowLeft")
    assert opened.page.input_value("#strength") == str(len(FACTORS) - 2)
    assert [opened.page.evaluate(f"percent({p})") for p in (1, 0.995, 0.994, 0.005, 0.004, 0)] == [
        "100%", ">99%", "99%", "1%", "<1%", "0%",
    ]  # fmt: skip
    opened.page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(12):
        opened.page.keyboard.press("Tab")
        reached.add(opened.page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"char", "strength", "play", "pair"} <= reached
    assert opened.said == []


def test_a_click_answers_within_a_tenth_of_a_second(browser: Any, demo: Demo) -> None:
    opened = Opened(browser, demo, DESKTOP)
    times = opened.page.evaluate(
        """() => { const slider = document.getElementById("strength"), found = [];
        for (let step = 10; step >= 0; step--) {
          let begun = performance.now();
          slider.value = step; slider.dispatchEvent(new Event("input"));
          found.push(performance.now() - begun);
          begun = performance.now();
          document.querySelectorAll(".char")[1]?.click();
          found.push(performance.now() - begun);
        }
        return found; }"""
    )
    assert np.median(times) < 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_no_wider_than_the_window(browser: Any, demo: Demo, width: int, scheme: str) -> None:
    opened = Opened(browser, demo, {"width": width, "height": 844}, scheme)
    for step in (10, 0):
        opened.slide(step)
        assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.said == []


def test_the_page_with_the_two_heads_off_is_photographed(browser: Any, demo: Demo, tmp_path: Path) -> None:
    opened = Opened(browser, demo, DESKTOP)
    for _ in FACTORS:
        opened.page.keyboard.press("ArrowDown")
    opened.page.wait_for_timeout(500)  # typed
    photograph(opened.page, "demo.png", tmp_path)


def test_the_readme_shows_these_lines(demo: Demo) -> None:
    assert "```text\n" + "\n".join(lines(demo)[:-1]) + "\npage: " in (ROOT / "README.md").read_text("utf-8")
