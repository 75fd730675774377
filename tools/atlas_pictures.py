"""Pictures of docs/atlas.md: the page of an atlas on a desk and on a phone.

`python -m tools.atlas_pictures out/atlas/atlas.html` makes docs/pictures/atlas.png and atlas-phone.png again.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image

from hooked_vlm.runtime.files import atomic_write

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
SIZES = {"atlas.png": (1280, 1000), "atlas-phone.png": (390, 844)}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def photographs(page: Path) -> dict[str, bytes]:
    """The top of a page with its first head pinned, as PNG by name of the file."""
    from playwright.sync_api import sync_playwright  # of the development extra

    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    found = {}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name, (width, height) in SIZES.items():
            opened = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
            opened.goto(page.resolve().as_uri())
            opened.wait_for_selector("body[data-ready]")
            opened.locator("#table tbody button").first.click()
            opened.mouse.move(0, 0)
            opened.evaluate("scrollTo(0, 0)")
            found[name] = small_png(opened.screenshot())
        browser.close()
    return found


def small_png(screenshot: bytes) -> bytes:
    """A picture as a PNG, all its colours kept: scales of colours are part of it."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(screenshot)) as picture:
        picture.convert("RGB").save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    for name, png in photographs(Path(sys.argv[1])).items():
        atomic_write(PICTURES / name, lambda aside, png=png: aside.write_bytes(png))
        print(f"{name}: {len(png) / 1000:.0f} kB")
