"""Pictures of an atlas's page for the docs."""

import io
from pathlib import Path

import pytest
from made_up_atlas import made_up_atlas, made_up_pictures
from PIL import Image
from viewing import CHROMIUM

from hooked_vlm.atlas.page import save_atlas_page
from tools.atlas_pictures import SIZES, photographs


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium, chromium-browser or google-chrome on the PATH")
def test_a_page_is_photographed_at_both_widths(tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    page = save_atlas_page(tmp_path / "atlas.html", made_up_atlas(language=(6, 6), vision=None), made_up_pictures())
    found = photographs(page)
    assert found.keys() == SIZES.keys()
    for name, png in found.items():
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.size == SIZES[name] and len(picture.convert("RGB").getcolors(1 << 20) or ()) > 50
