"""Measures what each deviation of the published OCR-heads code changes on toy-qwen2-vl (some minutes on one core).

python -m tools.deviation_table            # measure, and write experiments/ocr_heads/deviations.json and the page
python -m tools.deviation_table --page     # write the table in docs/ocr-heads.md from the file alone
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np

from hooked_vlm import HookedVLM
from hooked_vlm.experiments.ocr_heads.config import Protocol
from hooked_vlm.experiments.ocr_heads.data import haystack
from hooked_vlm.experiments.ocr_heads.data.scored import niah_pages, passkey_pages, toy_pages
from hooked_vlm.experiments.ocr_heads.deviations import deviation_table, measured
from hooked_vlm.experiments.ocr_heads.examples import Evidence, Example
from hooked_vlm.experiments.ocr_heads.official import QWEN2_VL
from hooked_vlm.toys import make_page, random_lines

ROOT = Path(__file__).parents[1]
FILE, PAGE = ROOT / "experiments/ocr_heads/deviations.json", ROOT / "docs/ocr-heads.md"
BEGIN, END = "<!-- deviations: python -m tools.deviation_table -->", "<!-- end of deviations -->"
N, N_LONG, N_PAPER, LENGTHS = 80, 16, 16, (64, 128)
PIXELS, NEW_TOKENS = 56 * 16 * 16, 8
WHAT = (
    f"toy-qwen2-vl, {N} toy pages (texts), {N_LONG} documents of twelve toy pages, and {N_PAPER} passkeys and "
    f"{N_PAPER} needles of {LENGTHS[0]} and {LENGTHS[1]} tokens (characters), which these models do not read"
)


def examples(as_text: bool, protocol: Protocol) -> Sequence[Sequence[Example]]:
    """Sets of examples; passkeys and needles as the protocol makes their pages."""
    code = QWEN2_VL if protocol.pages == "code" else None
    sets = [toy_pages(60, N, as_text)] + ([] if as_text else [documents(N_LONG)])
    with mock.patch.object(haystack, "from_hub", return_value=None):  # the synthetic ones, wherever this runs
        passkeys = passkey_pages(62, N_PAPER, LENGTHS, as_text, code)[0]
        return [*sets, passkeys, niah_pages(62, N_PAPER, LENGTHS, as_text, code is not None)[0]]


def documents(n: int) -> list[Example]:
    """Twelve toy pages of one line each, and a question about one of them."""
    rng = np.random.default_rng(61)
    found = []
    for _ in range(n):
        shown = [make_page(rng, lines=random_lines(rng, 1), font_size=14) for _ in range(12)]
        page = int(rng.integers(12))
        line = shown[page].lines[0]
        boxes = tuple(Evidence(i, i + 1, page, box) for i, box in enumerate(line.value_boxes))
        found.append(Example(shown[page].question(0), (line.value,), tuple(p.image for p in shown), boxes))
    return found


def markdown() -> str:
    """The table, between its marks."""
    table = deviation_table()
    rows = [list(table.columns), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join([BEGIN, *(f"| {' | '.join(row)} |" for row in rows), END])


def write_page() -> None:
    """Replace the table of docs/ocr-heads.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + markdown() + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    if "--page" not in sys.argv:
        records = measured(HookedVLM.from_pretrained("toy-qwen2-vl"), QWEN2_VL, examples, NEW_TOKENS, PIXELS)
        lines = ",\n  ".join(json.dumps(record) for record in records)
        FILE.write_text(f'{{"on": {json.dumps(WHAT)},\n "deviations": [\n  {lines}\n ]}}\n', encoding="utf-8")
    write_page()
