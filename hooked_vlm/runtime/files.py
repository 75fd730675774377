"""Atomic file writes."""

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hooked_vlm.errors import OutputError


def atomic_write(path: Path, save: Callable[[Path], Any]) -> None:
    """Write a file with `save(temporary_path)`, and rename it when complete.

    Raises:
        OutputError: it cannot be written; nothing is left of it.
    """
    if "\0" in str(path):
        raise OutputError(f"cannot write {str(path)!r}: no name of a file holds a zero character")
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:  # safetensors' writer has its own for a full disk
        raise OutputError(f"cannot write {path}: {why(error)}") from error
    finally:
        with suppress(OSError):  # an unreachable folder was reported already
            aside.unlink(missing_ok=True)


def why(error: BaseException) -> str:
    """The reason of an error in one line."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__).strip().splitlines()[0]


def writable_folder(folder: Path) -> Path:
    """Create a folder, and check that files can be written into it, before any work is done.

    Raises:
        OutputError: it is a file, or cannot be written.
    """
    atomic_write(folder / ".writable", lambda aside: aside.touch())
    (folder / ".writable").unlink(missing_ok=True)
    return folder
