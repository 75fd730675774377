"""What tests in a browser share: the distribution's Chromium without a window, driven by Playwright.

HOOKED_VLM_SCREENSHOTS=docs/pictures makes the documentation's pictures again.
"""

import os
import shutil
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}


def photograph(page: Any, name: str, folder: Path) -> None:
    """The whole page as a picture, in the folder unless the documentation's are asked for."""
    file = Path(os.environ.get("HOOKED_VLM_SCREENSHOTS", folder)) / name
    page.screenshot(path=str(file), full_page=True)
    assert file.stat().st_size > 10_000


class Opened:
    """A page, with everything it complained of or asked the network for."""

    def __init__(
        self, browser: Any, path: Path, size: dict[str, int], scheme: str = "light", address: str = ""
    ) -> None:
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri() + address)
        self.page.wait_for_selector("body[data-ready]")

    def _heard(self, message: Any) -> None:
        if "willReadFrequently" not in message.text:  # advice on how these tests read the canvas
            self.said.append(message.text)

    def readout(self) -> str:
        return self.page.inner_text("#readout")

    def check_quiet(self) -> None:
        assert self.said == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []
