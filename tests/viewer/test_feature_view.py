"""The feature page: its numbers, and what it does in a browser."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from viewing import DESKTOP, PHONE

from hooked_vlm.errors import InputError
from hooked_vlm.viewer import feature_view
from hooked_vlm.viewer.feature_view import FeatureEntry, FeaturePage, Mark, histogram, top_marks


def made() -> FeaturePage:
    """Three features over two pictures; the label of one would be markup if it were not escaped."""
    pictures = [Image.fromarray(np.full((112, 128, 3), shade, np.uint8)) for shade in (90, 200)]
    token, frame = (16.0, 32.0, 32.0, 48.0, 5.0), (18.0, 33.0, 25.0, 45.0)
    common: dict[str, Any] = {"counts": (3, 0, 1), "largest": 10.0, "active": 0.01}
    marks = (Mark(1, (token,), 5.0, (frame,)), Mark(0, (token, token), 5.0))
    logits: dict[str, Any] = {"raised": (("7", 2.5), ("<b>", 1.0)), "lowered": (("x", -1.5),)}
    entries = (
        FeatureEntry(4, "7", "glyph '7' is feature 4", True, 0.9, marks=marks, effect="it matters", **logits, **common),
        FeatureEntry(11, "</script><b>", "no feature", False, 0.3, marks=(Mark(0, (), 2.5),), **common),
        FeatureEntry(2, "", "No label chose it.", False, None, marks=(), **{**common, "active": 0.5}),
    )
    return FeaturePage("Features <of> a model", "How.", entries, tuple(pictures), (("model", "toy"),))


def test_the_page_holds_its_data_and_asks_for_nothing() -> None:
    page = made().html
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert [entry["feature"] for entry in data["features"]] == [4, 11, 2]
    assert data["features"][1]["label"] == "</script><b>" and data["pictures"][0]["width"] == 128
    assert "Features &lt;of&gt; a model" in page and "://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in page


def test_a_page_that_browsers_would_not_open_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(feature_view, "LARGEST", 1000)
    with pytest.raises(InputError, match="fewer features"):
        made().save(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_an_entry_of_a_picture_that_is_not_there_is_refused() -> None:
    page = made()
    with pytest.raises(InputError, match="not there"):
        _ = FeaturePage(page.title, "", page.entries, page.pictures[:1]).html


def test_histograms_count_what_is_above_zero() -> None:
    values = np.array([0.0, -3.0, 0.1, 1.0, 23.9, 24.0])
    counts = histogram(values)
    assert counts[0] == 1 and counts[1] == 1 and counts[23] == 2 and sum(counts) == 4
    assert set(histogram(-values[values > 0])) == {0}


def test_top_pictures_are_those_of_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    values = np.where(rng.random(200) < 0.3, rng.random(200), 0.0)
    picture, boxes = np.repeat(np.arange(20), 10), rng.random((200, 4)) * 100
    values[30:40], boxes[values.argmax()] = 0.0, np.nan
    found = top_marks(values, picture, boxes, 5)
    largest = {number: values[picture == number].max() for number in range(20)}
    assert [mark.picture for mark in found] == sorted(largest, key=lambda number: -largest[number])[:5]
    for mark in found:
        number, tokens = mark.picture, mark.tokens
        assert mark.largest == largest[number]
        expected = [
            (*boxes[row].round(1), values[row])
            for row in range(200)
            if picture[row] == number and values[row] > 0 and np.isfinite(boxes[row]).all()
        ]
        np.testing.assert_allclose(np.array(tokens).reshape(-1, 5), np.array(expected).reshape(-1, 5), rtol=1e-3)
    assert 3 not in {mark.picture for mark in top_marks(values, picture, boxes, 20)}  # nothing is active on it


@pytest.mark.slow
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_features_are_listed_filtered_and_shown(size: dict[str, int], browser: Any, tmp_path: Path) -> None:
    path = made().save(tmp_path / "page.html")
    page = browser.new_page(viewport=size)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri() + "#feature-4")
    page.wait_for_selector("body[data-ready]")

    def listed() -> list[str]:
        return page.locator("#index tbody tr td:first-child").all_inner_texts()

    assert listed() == ["4", "11", "2"] and page.inner_text("#name") == "Feature 4: 7"
    assert page.locator("#tops svg").count() == 2 and page.locator("#tops rect.token").count() == 3
    token, frame = page.locator("#tops rect.token").first, page.locator("#tops rect.frame")
    assert [token.get_attribute(name) for name in ("x", "y", "width", "height")] == ["16", "32", "16", "16"]
    assert float(token.get_attribute("fill-opacity")) == pytest.approx(0.375) and frame.count() == 1
    assert page.locator("#raised span").all_inner_texts() == ["7 +2.5", "<b> +1"]
    assert page.inner_text("#effect") == "it matters" and page.locator("#histogram rect").count() == 3

    page.locator("#index button", has_text="11").click()
    assert page.inner_text("#name") == "Feature 11" and page.url.endswith("#feature-11")
    assert not page.is_visible("#direct") and not page.is_visible("#ablation")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#name") == "Feature 2" and page.inner_text("#said") == "No label chose it."

    page.check("#found")
    assert listed() == ["4"] and page.inner_text("#count") == "1 of 3 features"
    page.uncheck("#found")
    page.select_option("#order", "active")
    assert listed() == ["2", "4", "11"]
    page.fill("#find", "7")
    assert listed() == ["4"]
    page.fill("#find", "11")
    assert listed() == ["11"]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth") and said == []
    page.close()
