"""Picture and video files in the forms that users have them: paths, addresses, contents, open files."""

import base64
import binascii
import io
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from hooked_vlm.errors import ImageError
from hooked_vlm.inputs.remote import fetch

MOST_BYTES = 2**30
"""Most bytes that are read from an open file, which may have no end."""


def is_file_source(x: Any) -> bool:
    """Whether `open_source` takes `x`."""
    return isinstance(x, str | os.PathLike | bytes | bytearray | memoryview | Mapping) or hasattr(x, "read")


def open_source(source: Any, kind: str, allow_remote: bool = False) -> tuple[str | io.BytesIO, str]:
    """Resolve a file source to a path that exists or to the file's contents.

    Args:
        source: a path, a `file://` or `data:` URI, an http(s) address, bytes, a binary file object (read from its
            beginning, its position kept), or {"bytes": ..., "path": ...}, an undecoded file of Hugging Face `datasets`.
        kind: "an image" or "a video", for messages.
        allow_remote: whether http(s) addresses are fetched.

    Returns:
        The path or the contents, and the source's name in error messages.

    Raises:
        ImageError: there is no such file, it is empty or not readable, or it is remote and that is not allowed.
    """
    if isinstance(source, Mapping):
        return _from_record(source, kind, allow_remote)
    if isinstance(source, str | os.PathLike):
        return _from_text(os.fsdecode(source), kind, allow_remote)
    if isinstance(source, bytes | bytearray | memoryview):
        return _contents(bytes(source), f"the bytes of {kind}")
    if not hasattr(source, "read"):
        raise ImageError(f"expected {kind} as a path, bytes or an open file, got {type(source).__name__}")
    return _contents(_read(source), repr(str(getattr(source, "name", "")) or type(source).__name__))


def _from_record(record: Mapping[str, Any], kind: str, allow_remote: bool) -> tuple[str | io.BytesIO, str]:
    data, path = record.get("bytes"), record.get("path")
    if set(record) - {"bytes", "path"} or (data is None and path is None):
        keys = sorted(map(str, record))
        raise ImageError(f'expected {kind} as {{"bytes": ..., "path": ...}} with one of them set, got the keys {keys}')
    if data is None:
        return open_source(path, kind, allow_remote)
    file, name = open_source(data, kind)
    return file, (name if path is None else repr(str(path)))


def _from_text(text: str, kind: str, allow_remote: bool) -> tuple[str | io.BytesIO, str]:
    name = repr(text if len(text) <= 200 else text[:200] + "...")
    scheme = text[:8].lower()
    if scheme.startswith(("http://", "https://")):
        if not allow_remote:
            raise ImageError(f"{name} is an address: download {kind} first, or pass allow_remote=True to fetch it")
        return _contents(fetch(text), name)
    if scheme.startswith("data:"):
        return _contents(from_data_uri(text), f"the data URI {text[:40]!r}")
    path = text
    if scheme.startswith("file://"):  # as qwen-vl-utils: the rest is the path; percent-encoded, too
        path = text[7:] if os.path.exists(text[7:]) else unquote(text[7:])
    # os.path, unlike pathlib, answers False to a string that cannot be a path (base64 data, say)
    if not os.path.isfile(path):
        state = (
            "is a folder" if os.path.isdir(path)
            else "is not a regular file" if os.path.exists(path)
            else "does not exist"
        )  # fmt: skip
        raise ImageError(f"expected the path of {kind} file, but {name} {state}: check the path")
    if os.path.getsize(path) == 0:
        raise ImageError(_empty(name))
    return path, name


def _contents(data: bytes, name: str) -> tuple[io.BytesIO, str]:
    if not data:
        raise ImageError(_empty(name))
    return io.BytesIO(data), name


def _empty(name: str) -> str:
    return f"{name} is empty (0 bytes): write or download it again"


def _read(file: Any) -> bytes:
    """Everything in an open binary file, whose position is kept."""
    try:
        seekable = hasattr(file, "seekable") and file.seekable()
        before = file.tell() if seekable else 0
        if seekable:
            file.seek(0)
        data = file.read(MOST_BYTES + 1)
        if seekable:
            file.seek(before)
    except (OSError, ValueError, TypeError) as error:  # closed, write-only, or not a file at all
        raise ImageError(f"the file object cannot be read ({error}): open it with mode 'rb'") from error
    if not isinstance(data, bytes):
        raise ImageError(f"expected a file of bytes, but it reads as {type(data).__name__}: open it with mode 'rb'")
    if len(data) > MOST_BYTES:
        raise ImageError(f"the file object has more than {MOST_BYTES} bytes: give a path or a part of it")
    return data


def from_data_uri(uri: str) -> bytes:
    """The contents of a `data:` URI (RFC 2397).

    Raises:
        ImageError: it has no comma, or no valid base64 behind it.
    """
    header, comma, body = uri.partition(",")
    if not comma:
        raise ImageError(
            f"the data URI {uri[:40]!r} has no comma before its data: expected 'data:image/png;base64,...'"
        )
    data = unquote_to_bytes(body.encode("utf-8", "replace"))
    return from_base64(data) if header.lower().endswith(";base64") else data


def from_base64(text: str | bytes) -> bytes:
    """Decode base64, with line breaks or without; a `data:` URI is accepted, too.

    Raises:
        ImageError: it is not base64.
    """
    if isinstance(text, str) and text[:5].lower() == "data:":
        return from_data_uri(text)
    try:
        raw = text.encode("ascii") if isinstance(text, str) else text
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except (binascii.Error, UnicodeEncodeError, AttributeError) as error:
        raise ImageError(f"expected a picture in base64, got {text!r:.60} ({error})") from error
