"""Pictures at http(s) addresses, against a server on this machine: fetched only when asked, within bounds."""

import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_qwen2_vl import reading_model

from hooked_vlm import ImageError
from hooked_vlm.inputs import remote
from hooked_vlm.inputs.images import load_image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
requests: list[str] = []


def png() -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    return file.getvalue()


class Server(BaseHTTPRequestHandler):
    """Pictures, redirects and misbehaviour, by the path that is asked for."""

    def do_GET(self) -> None:
        requests.append(self.path)
        kind = self.path.strip("/").partition("?")[0]
        if kind.startswith("to-"):
            targets = {
                "to-file": "file:///etc/hostname",
                "to-ftp": "ftp://127.0.0.1/a.png",
                "to-data": "data:image/png;base64,AAAA",
                "to-picture": "/picture.png",
                "to-itself": "/to-itself",
            }
            self.send_response(302)
            self.send_header("Location", targets[kind])
            self.end_headers()
        elif kind == "drip":
            self.send_response(200)
            self.end_headers()
            self.drip(b"x")
        elif kind == "drip-headers":
            self.drip(b"H")
        elif kind in ("large", "large-without-length", "short"):
            self.send_response(200)
            if kind != "large-without-length":
                self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(bytes(100 if kind == "short" else 5000))
        elif kind == "picture.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())
        else:
            self.send_error(404)

    def drip(self, byte: bytes) -> None:
        try:
            for _ in range(100):
                self.wfile.write(byte)
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass  # the client has gone

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the fixture of all tests: this machine may be reached."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", f"a test tried to connect to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    requests.clear()


@pytest.mark.parametrize("path", ["/picture.png", "/picture.png?size=large", "/to-picture"])
def test_a_picture_is_fetched_when_that_is_allowed(address: str, path: str) -> None:
    assert np.array_equal(np.array(load_image(address + path, allow_remote=True)), np.array(PICTURE))


@pytest.mark.parametrize("where", ["image", "url", "path", "image_url", "images=", "a frame", "datasets"])
def test_nothing_is_asked_of_the_network_unless_allowed(address: str, where: str) -> None:
    model, url = reading_model(), address + "/picture.png"
    given: dict[str, Any] = {"prompt": "a"}
    if where == "images=":
        given["images"] = url
    elif where == "a frame":
        given["videos"] = [[url, PICTURE]]
    elif where == "datasets":
        given["images"] = {"bytes": None, "path": url}
    else:
        part = {"type": "image", where: {"url": url} if where == "image_url" else url}
        given["prompt"] = [{"role": "user", "content": [part, {"type": "text", "text": "a"}]}]
    with pytest.raises(ImageError, match="allow_remote"):
        model.to_inputs(**given)
    assert requests == []
    inputs = model.to_inputs(**given, allow_remote=True)
    here = {"videos": [[PICTURE, PICTURE]]} if where == "a frame" else {"images": PICTURE}
    expected = model.to_inputs("a", **here)
    assert torch.equal(inputs.tokens, expected.tokens) and requests == ["/picture.png"]
    assert where == "a frame" or torch.equal(inputs.pixel_values, expected.pixel_values)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/to-file", "(?i)redirect"),
        ("/to-ftp", "redirects"),
        ("/to-data", "(?i)redirect"),
        ("/to-itself", "redirect"),
        ("/missing.png", "404"),
        ("/large", "bytes"),
        ("/large-without-length", "more than"),
        ("/short", "100 of 5000|IncompleteRead"),
        ("/drip", "seconds"),
        ("/drip-headers", "seconds"),
    ],
)
def test_what_goes_beyond_the_bounds_is_refused(address: str, path: str, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(ImageError, match=says):
        remote.fetch(address + path, timeout=0.6, most_bytes=10**6 if path == "/short" else 3000)
    assert time.monotonic() - began < 5


def test_a_closed_port_and_a_name_that_is_none_are_refused() -> None:
    for url in ("http://127.0.0.1:9/a.png", "http://[", "http://"):
        with pytest.raises(ImageError):
            load_image(url, allow_remote=True)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/a", "data:,a", "/etc/hostname", ""])
def test_only_http_is_fetched(url: str) -> None:
    with pytest.raises(ImageError, match="http"):
        remote.fetch(url)
