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
