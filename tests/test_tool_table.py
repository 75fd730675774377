"""The page about TransformerLens' tools is what running them gives."""

from pathlib import Path

from hooked_vlm.tool_table import PATCHING, TOOLS, Setup, outcome, page, setups


def test_the_page_is_generated() -> None:
    assert (Path(__file__).parents[1] / "docs" / "transformerlens.md").read_text(encoding="utf-8") == page()


def test_every_activation_patch_is_in_it() -> None:
    assert len(PATCHING) == 18 and all(f"`{name}`" in TOOLS["transformer_lens.patching"] for name in PATCHING)


def test_an_error_of_our_own_is_no_refusal_of_theirs() -> None:
    def broken(setup: Setup) -> None:
        raise ZeroDivisionError

    try:
        outcome(broken, setups()[0])
    except ZeroDivisionError:
        return
    raise AssertionError("the error was taken for TransformerLens'")
