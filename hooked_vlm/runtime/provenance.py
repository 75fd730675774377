"""Hash of the code that computed a result."""

import hashlib
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

OWN = ("hooked_vlm", "hooked_vlm.converters", "hooked_vlm.experiments")


@cache
def code_hash() -> str:
    """Hash (16 digits) of the library's own code, wherever it is installed.

    Between two releases the version stays the same while the code changes; this does not.
    """
    digest = hashlib.sha256()
    for package in OWN:
        root = _folder(package)
        for parent, folders, files in os.walk(root):
            # parts of the whole, which in a checkout are links to folders elsewhere
            folders[:] = sorted(name for name in folders if _name_of(package, root, parent, name) not in OWN)
            for file in sorted(name for name in files if name.endswith(".py")):
                digest.update(f"{_name_of(package, root, parent, file)}\n".encode() + Path(parent, file).read_bytes())
    return digest.hexdigest()[:16]


def _folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _name_of(package: str, root: Path, parent: str, name: str) -> str:
    return ".".join((package, *Path(parent).relative_to(root).parts, name))
