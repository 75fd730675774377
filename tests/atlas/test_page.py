"""The page of an atlas, as a file: what is in it, how large it is, what it refuses."""

import base64
import html
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_atlas import made_up_atlas, made_up_pictures
from PIL import Image

from hooked_vlm.atlas.definitions import BY_NAME
from hooked_vlm.atlas.page import DOUBLES, NONE, SINGLES, Picture, atlas_page, save_atlas_page, strongest_pictures
from hooked_vlm.atlas.result import Atlas, Observed
from hooked_vlm.errors import InputError

HOSTILE = """</script><script>alert(1)</script><img src=x onerror=alert(2)> " ' {{ 7 * 7 }} `${1}`"""


def packed(page: str, name: str) -> bytes:
    (text,) = re.findall(rf'<script type="text/plain" id="{name}">(.*?)</script>', page)
    return zlib.decompress(base64.b64decode(text))


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(text)


def test_the_page_holds_the_numbers_of_the_table() -> None:
    found = made_up_atlas(language=(3, 4), vision=(2, 5))
    page = atlas_page(found)
    sets = data_of(page)["sets"]
    assert [own["model"] for own in sets] == [found.model]
    for blob, (tower, own) in enumerate(sets[0]["towers"].items()):
        rows = found.table[found.table["tower"] == tower]
        assert (own["layers"], own["heads"]) == found.shape(tower)
        assert own["scores"] == [score.name for score in found.scores if score.tower == tower]
        data = packed(page, f"values-{blob}")
        n = len(rows)
        doubles = np.frombuffer(data, "<f8", 2 * n).reshape(2, n)
        singles = np.frombuffer(data, "<f4", offset=16 * n).reshape(5, n)
        for name, values in zip((*DOUBLES, *SINGLES), (*doubles, *singles), strict=True):
            np.testing.assert_allclose(values, rows[name], rtol=1e-6)
        # in the order that the page reads: score, layer, head
        np.testing.assert_allclose(
            singles[0].reshape(len(own["scores"]), *found.shape(tower)),
            np.stack([found.values(name) for name in own["scores"]]),
            rtol=1e-6,
        )


def test_of_two_atlases_the_page_holds_the_differences_too() -> None:
    a = made_up_atlas("a", (3, 4), (2, 3))
    b = made_up_atlas("b", (3, 4), (3, 3), seed=1)
    page = atlas_page(a, other=b)
    sets = data_of(page)["sets"]
    assert [sorted(own["towers"]) for own in sets] == [["language", "vision"], ["language", "vision"], ["language"]]
    scores = sets[2]["towers"]["language"]["scores"]
    n = len(scores) * 12
    singles = np.frombuffer(packed(page, "values-4"), "<f4", offset=16 * n).reshape(5, len(scores), 3, 4)
    np.testing.assert_allclose(singles[0], np.stack([b.values(s) - a.values(s) for s in scores]), atol=1e-6)
    assert (singles[3] == 0).all()
    assert "Heads of the vision tower do not correspond" in page
    apart = atlas_page(a, other=made_up_atlas("c", (4, 4), None))
    assert len(data_of(apart)["sets"]) == 2 and "cannot be compared" in apart


def test_pictures_are_those_that_the_atlas_names() -> None:
    found, pictures = made_up_atlas(language=(3, 4), vision=(2, 3)), made_up_pictures()
    names = [picture.name for picture in pictures]
    for name in ("ocr", "image_from_answer", "text_region", "locality", "induction"):
        numbers, values = strongest_pictures(found, name, pictures)
        own = found.observed[name]
        for layer, head in np.ndindex(own.values.shape[1:]):
            order = [s for s in found.strongest(name, layer, head, len(own.stimuli)) if s in names][:3]
            shown = [names[i] for i in numbers[layer, head] if i != NONE]
            assert shown == order
            at = [own.values[own.stimuli.index(s), layer, head] for s in order]
            np.testing.assert_allclose(values[layer, head, : len(order)], at, rtol=1e-6)
            assert np.isnan(values[layer, head, len(order) :]).all()


def test_a_stimulus_without_a_value_is_never_the_strongest() -> None:
    values = np.array([[[np.nan]], [[0.2]], [[0.5]]])
    found = Atlas("m", {"ocr": Observed(("p", "q", "r"), values, np.zeros_like(values))})
    pictures = [Picture(name, Image.new("RGB", (4, 4))) for name in ("p", "q", "r")]
    numbers, _ = strongest_pictures(found, "ocr", pictures)
    assert numbers.ravel().tolist() == [2, 1, NONE]


@pytest.mark.slow
def test_a_page_of_784_and_512_heads_is_small(tmp_path: Path) -> None:
    found, pictures = made_up_atlas(), made_up_pictures()[:24]
    assert len(found.table) == 18 * 784 + 5 * 512
    alone = save_atlas_page(tmp_path / "one.html", found, pictures).stat().st_size
    both = save_atlas_page(tmp_path / "two.html", found, pictures, made_up_atlas("b", seed=1)).stat().st_size
    assert alone < 1_500_000 and both < 4_000_000


def test_the_page_is_whole_and_asks_for_nothing() -> None:
    page = atlas_page(made_up_atlas(language=(2, 2), vision=None), made_up_pictures()[:2])
    assert "default-src 'none'" in page and "{{" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    for address in re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']+)", page):
        assert address.startswith("data:"), address
    for score in BY_NAME.values():
        if score.tower == "language":
            assert score.title in page and score.formula in html.unescape(page)


def test_names_and_captions_are_text_whatever_they_hold() -> None:
    found = made_up_atlas(HOSTILE, (2, 2), None)
    hostile = Picture("page-0", Image.new("RGB", (9, 9)), HOSTILE, "pictures/<b>.html")
    renamed = {
        name: Observed((HOSTILE, *own.stimuli[1:]), own.values, own.nulls) for name, own in found.observed.items()
    }
    page = atlas_page(Atlas(HOSTILE, found.observed, {"note": HOSTILE, HOSTILE: 1}), [hostile], found)
    named = atlas_page(Atlas("m", renamed), [Picture(HOSTILE, np.zeros((8, 9, 3), np.uint8))])
    for made in (page, named):
        assert "alert(1)</script>" not in made and "<img src=x" not in made
        assert made.count("<script") == made.count("</script>")
    shown = html.unescape(page.partition("</header>")[0])
    assert shown.count(HOSTILE) == 6  # title (both names), name, setting and its name, name of the other
    assert data_of(page)["pictures"][0]["caption"] == HOSTILE
    assert data_of(named)["pictures"][0]["name"] == HOSTILE


def test_links_are_files_beside_the_page() -> None:
    found, image = made_up_atlas(language=(2, 2), vision=None), Image.new("RGB", (4, 4))
    for link in ("https://example.org/x", "//example.org", "/etc/x.html"):
        for picture in (Picture("page-0", image, link=link), Picture("page-0", image, vision_link=link)):
            with pytest.raises(InputError, match="beside the page"):
                atlas_page(found, [picture])
    odd = {"javascript:alert(1)": "javascript%3Aalert%281%29", "a b#1?.html": "a%20b%231%3F.html"}
    for name, link in odd.items():  # names of files, whatever they look like
        (shown,) = data_of(atlas_page(found, [Picture("page-0", image, link=name)]))["pictures"]
        assert (shown["language"], shown["vision"]) == (link, "")


def test_facts_are_short() -> None:
    found = made_up_atlas(language=(2, 2), vision=None)
    kinds = {"page-0": "page", "page-1": "page", "text-0": "text"}
    told = Atlas(
        "m", found.observed, {"weights": "0123456789abcdef" * 4, "kinds": kinds, "digests": {}, "share": 0.12345}
    )
    header = atlas_page(told).partition("</header>")[0]
    assert "<dd>0123456789ab…</dd>" in header and "<dd>2 page, 1 text</dd>" in header and "<dd>0.123</dd>" in header


def test_pictures_of_no_stimulus_or_of_one_twice_are_refused() -> None:
    found, image = made_up_atlas(language=(2, 2), vision=None), Image.new("RGB", (4, 4))
    with pytest.raises(InputError, match="no stimulus 'page-99'"):
        atlas_page(found, [Picture("page-99", image)])
    with pytest.raises(InputError, match="two pictures"):
        atlas_page(found, [Picture("page-1", image), Picture("page-1", image)])
    with pytest.raises(InputError, match="without a score"):
        atlas_page(Atlas("empty", {}))


def test_the_page_says_which_tests_no_head_can_pass() -> None:
    """Of 16 heads one can pass on ten stimuli: 16 / 2^9 is below 0.05, 16 / 2^8 is not."""
    for n in (9, 10):
        names, values = tuple(f"s{i}" for i in range(n)), np.random.default_rng(0).random((n, 4, 4))
        observed = {name: Observed(names, values, np.zeros_like(values)) for name in ("ocr", "entropy")}
        page = html.unescape(atlas_page(Atlas("made <up>", observed)))
        said = '<p class="warning">made <up> has too few stimuli for any head to be significant in: OCR.</p>'
        assert (said in page) == (n == 9)
