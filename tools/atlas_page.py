"""The table of definitions in docs/atlas.md. `python -m tools.atlas_page` writes it."""

from pathlib import Path

from hooked_vlm.analysis.text_tables import markdown_table
from hooked_vlm.atlas.definitions import KINDS, SCORES, TOWERS

PAGE = Path(__file__).parents[1] / "docs" / "atlas.md"
BEGIN, END = "<!-- definitions, by `python -m tools.atlas_page` -->\n", "<!-- end of definitions -->\n"


def definitions() -> str:
    """Tables of the scores of each tower, and of the kinds of stimuli."""
    parts = []
    for tower, name in TOWERS.items():
        rows = [
            (f"`{score.name}`", f"{score.title}: {score.formula}", score.unit, ", ".join(score.kinds),
             score.null or "not tested", score.source)
            for score in SCORES
            if score.tower == tower
        ]  # fmt: skip
        table = markdown_table(("score", "definition", "unit", "on", "null", "source"), rows)
        parts.append(f"**{name.capitalize()}**\n\n{table}")
    kinds = [(f"`{kind}`", what) for kind, what in KINDS.items()]
    parts.append(f"**Stimuli**\n\n{markdown_table(('kind', 'what it is'), kinds)}")
    return "\n".join(parts)


def page() -> str:
    """The page with the tables of now."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n{definitions()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(PAGE.parents[1])}")
