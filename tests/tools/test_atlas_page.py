"""The page about atlases defines every score."""

from hooked_vlm.atlas.definitions import SCORES
from tools.atlas_page import PAGE, page


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(), "run: python -m tools.atlas_page"
    assert all(f"| `{score.name}` |" in text for score in SCORES)
