"""Access control of the served page: only this machine's browser, and in it only our own page."""

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

App = Callable[[Any, Any, Any], Awaitable[None]]

HOSTS = ("127.0.0.1", "localhost")
"""Names of loopback. Any port: it may come through a tunnel."""
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
"""Forbids the page to contact other machines, and other pages to frame it."""


class Guard:
    """ASGI middleware: requests by another name, from another origin, or with too large a body are refused.

    A foreign page can make a browser send requests here; it cannot forge the `Origin`, nor, having its own name
    resolved to this machine, the `Host`.
    """

    def __init__(self, app: App, most_bytes: int) -> None:
        self.app = app
        self.most_bytes = most_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if refusal := self.refusal(scope):
            await _refuse(scope["type"], send, *refusal)
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        await self.app(scope, receive, send_with_policy)

    def refusal(self, scope: Any) -> tuple[int, str] | None:
        """Status and reason, or None if the request may pass."""
        given: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            given.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts, origins = given.get("host", []), given.get("origin", [])
        if len(hosts) != 1 or _name(hosts[0]) not in HOSTS:
            return 403, "this page answers to 127.0.0.1 and localhost only"
        if origins and origins != [f"http://{hosts[0]}"]:
            return 403, "another page may not speak to this one"
        if "transfer-encoding" in given:
            return 411, "the length of a body must be stated"
        if any(not length.isdigit() or int(length) > self.most_bytes for length in given.get("content-length", [])):
            return 413, f"at most {self.most_bytes} bytes can be sent"
        return None


def _name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


async def _refuse(kind: str, send: Any, status: int, reason: str) -> None:
    if kind == "websocket":  # closed before it was accepted, which the browser sees as a 403
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
