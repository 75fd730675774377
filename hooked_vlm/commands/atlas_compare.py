"""`hooked-vlm atlas-compare`: which heads changed between two atlases."""

from typing import Any

from hooked_vlm.atlas.comparison import compare
from hooked_vlm.atlas.page import save_atlas_page
from hooked_vlm.atlas.result import Atlas
from hooked_vlm.commands.config import AtlasCompareConfig
from hooked_vlm.runtime.files import atomic_write, writable_folder

TABLE, PAGE = "compare.csv", "compare.html"


def answer(config: AtlasCompareConfig) -> tuple[str, dict[str, Any]]:
    """Compare the atlases in two folders; what to print, and the same as data.

    Raises:
        InputError: a folder without an atlas, or atlases that cannot be compared.
        OutputError: --out cannot be written.
    """
    a, b = Atlas.load(config.a), Atlas.load(config.b)
    found = compare(a, b)
    files = {}
    if config.out is not None:
        out = writable_folder(config.out)
        atomic_write(out / TABLE, lambda aside: found.table.to_csv(aside, index=False, lineterminator="\n"))
        files = {"table": str(out / TABLE), "page": str(save_atlas_page(out / PAGE, a, other=b))}
    written = "".join(f"\n{name}: {path}" for name, path in files.items())
    return found.text + (f"\n{written}" if written else ""), {**found.data, **files}
