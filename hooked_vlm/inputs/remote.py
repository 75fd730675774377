"""Fetching a file over http(s): bounded in time and size, and never anything but http(s)."""

import threading
import time
from http.client import HTTPException, HTTPMessage
from typing import Any, NoReturn
from urllib import request
from urllib.error import HTTPError
from urllib.parse import urlsplit

from hooked_vlm.errors import ImageError

TIMEOUT = 30.0
"""Seconds for the whole transfer, connection and redirects included."""
MOST_FETCHED = 2**28
"""Largest file that is fetched."""
_CHUNK = 2**16


class _HTTPRedirects(request.HTTPRedirectHandler):
    """Follow redirects to http(s) addresses only (urllib itself would follow one to ftp)."""

    def redirect_request(
        self, req: request.Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> request.Request | None:
        if urlsplit(newurl).scheme not in ("http", "https"):
            fp.close()
            raise ImageError(f"it redirects to {newurl[:200]!r}, which is no http(s) address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, timeout: float = TIMEOUT, most_bytes: int = MOST_FETCHED) -> bytes:
    """Fetch the file at an http(s) address.

    Args:
        timeout: seconds for the whole transfer.
        most_bytes: a larger file is refused.

    Raises:
        ImageError: no http(s) address, no connection, an error status, a redirect to anything but http(s), a file that
            is too large or takes too long.
    """
    if not url.lower().startswith(("http://", "https://")):
        _refuse(url, "expected an http(s) address")
    result: list[bytes | Exception] = []

    def transfer() -> None:
        try:
            result.append(_read(url, time.monotonic() + timeout, timeout, most_bytes))
        except Exception as error:
            if isinstance(error, HTTPError):
                error.close()
            result.append(error)

    # a server that sends its headers byte by byte never meets a socket's timeout, nor does a name that does not resolve
    thread = threading.Thread(target=transfer, daemon=True)
    thread.start()
    thread.join(timeout)
    if not result or isinstance(result[0], TimeoutError):
        _refuse(url, f"it took more than {timeout:g} seconds")
    if isinstance(result[0], Exception):
        if not isinstance(result[0], ImageError | OSError | HTTPException | ValueError):
            raise result[0]
        _refuse(url, str(result[0]))
    return result[0]


def _read(url: str, deadline: float, timeout: float, most_bytes: int) -> bytes:
    # not build_opener: it would add the handlers of file:, ftp: and data: addresses
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(), request.HTTPHandler(), request.HTTPSHandler(), _HTTPRedirects(),
        request.HTTPDefaultErrorHandler(), request.HTTPErrorProcessor(), request.UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    data = bytearray()
    with opener.open(request.Request(url, headers={"User-Agent": "hooked-vlm"}), timeout=timeout) as response:
        if int(response.headers.get("Content-Length") or 0) > most_bytes:
            raise ImageError(f"it has {response.headers['Content-Length']} bytes, more than {most_bytes}")
        while chunk := response.read1(_CHUNK):
            data += chunk
            if len(data) > most_bytes:
                raise ImageError(f"it has more than {most_bytes} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError
        if int(response.headers.get("Content-Length") or 0) > len(data):
            raise ImageError(f"it ended after {len(data)} of {response.headers['Content-Length']} bytes")
    return bytes(data)


def _refuse(url: str, why: str) -> NoReturn:
    raise ImageError(f"{url[:200]!r} could not be fetched: {why}; download the file and give its path")
