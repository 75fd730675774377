"""The served page: edit picture, prompt and heads, and run the model again. On loopback only."""

import asyncio
import html
import logging
import math
import secrets
import socket
import warnings
import webbrowser
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse
from nicegui import context, ui
from nicegui.element import Element

from hooked_vlm.errors import GeometryError, HookError, ImageError, InputError
from hooked_vlm.inputs.images import load_image_bytes
from hooked_vlm.viewer.guard import Guard
from hooked_vlm.viewer.scene import data_url
from hooked_vlm.viewer.session import MOST_TOKENS, Answer, Asked, Picture, Session, Shown
from hooked_vlm.viewer.steering_control import SteeringControl
from hooked_vlm.viewer.view import Head, page_file

MOST_BYTES = 64 * 2**20
"""The largest file that can be chosen."""
MENDABLE = (GeometryError, HookError, ImageError, InputError)
"""Errors that a user can correct, shown as a line in the page."""

_log = logging.getLogger(__name__)


def serve(session: Session, start: Asked, port: int = 0, open_browser: bool = False) -> None:
    """Serve the page until interrupted. It opens with the answer to `start`, if that has a picture and a prompt.

    Args:
        start: what the page asks at first.
        port: 0 for any free one.

    Raises:
        InputError: the port cannot be had, or `start` asks for what there is not.
        ImageError: the model cannot take its picture.
    """
    first = session.answer(start) if start.picture is not None and start.prompt.strip() else None
    pages: dict[str, str] = {}
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, most_bytes=MOST_BYTES + 2**16)  # the form around the file

    @app.get("/attention/{key}")
    def attention_page(key: str) -> HTMLResponse:
        if key not in pages:
            raise HTTPException(404, "this result is no longer shown")
        return HTMLResponse(pages[key], headers={"cache-control": "no-store"})

    @ui.page("/")
    def main_page() -> None:
        ServedPage(session, start, pages, first)

    ui.run_with(
        app,
        title="hooked-vlm",
        dark=None,
        tailwind=False,
        reconnect_timeout=30,
        show_welcome_message=False,
    )
    with _listening(port) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        print(f"page: {address} (Ctrl-C ends it)", flush=True)
        if open_browser:
            webbrowser.open(address)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, server_header=False)
        with warnings.catch_warnings():  # NiceGUI looks at every object there is, torch's deprecated ones included
            warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)
            uvicorn.Server(config).run(sockets=[listener])


def _listening(port: int) -> socket.socket:
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"port {port} cannot be had ({error}): choose another, or 0 for any free one") from error
    return listener


class HeadGrid(Element, component="head_grid.js"):
    """All heads as buttons, those edited with their factor."""

    def __init__(self, n_layers: int, n_heads: int) -> None:
        super().__init__()
        self.props.update(layers=n_layers, heads=n_heads)
        self.show({})

    def show(self, factors: dict[Head, float | int]) -> None:
        self.props["factors"] = {f"{layer}.{head}": factor for (layer, head), factor in factors.items()}
        self.update()


class ServedPage:
    """One tab: its settings, and the result it shows."""

    def __init__(self, session: Session, start: Asked, pages: dict[str, str], first: Shown | None) -> None:
        self.session = session
        self.pages = pages
        self.picture = start.picture
        self.factors: dict[Head, float | int] = dict(start.factors)
        self.shown: Shown | None = None
        self.key = ""
        context.client.on_delete(lambda: self.pages.pop(self.key, None))
        self._build(start)
        if first is not None:
            self._show(first)

    @property
    def asked(self) -> Asked:
        """The current settings.

        Raises:
            InputError: a scale of steering that is no number.
        """
        n_tokens = self.n_tokens.value
        whole = None if n_tokens is None else int(n_tokens)
        steering = None if self.steering is None else self.steering.chosen
        return Asked(self.picture, self.prompt.value or "", whole, tuple(sorted(self.factors.items())), steering)

    # ---------------------------------------------------------------- what is on the page

    def _build(self, start: Asked) -> None:
        ui.add_css(page_file("look.css") + page_file("serve.css"))
        ui.html("Change the picture, edit heads, ask again", tag="h1")
        with ui.element("section").classes("settings").props('aria-label="Settings"'):
            with ui.element("div"):
                self.upload = ui.upload(
                    auto_upload=True, max_file_size=MOST_BYTES, on_upload=self._uploaded, on_rejected=self._rejected
                ).classes("hidden")
                self.upload.props("accept=image/*")
                self.image = ui.element("img").classes("picture")
                with ui.element("div").classes("inline"):
                    choose = ui.button("Choose a picture", icon="image", color=None).props("outline")
                    choose.on("click", js_handler=f"() => getElement({self.upload.id}).$refs.qRef.pickFiles()")
                    self.name = ui.label().classes("soft")
                self.prompt = ui.textarea("Prompt", value=start.prompt, on_change=self._compare)
                self.prompt.props("outlined autogrow")
                self.n_tokens = ui.number(
                    "Most tokens", value=start.max_new_tokens, min=1, max=MOST_TOKENS, precision=0
                )
                self.n_tokens.on_value_change(self._compare)
                self.n_tokens.props("outlined dense").classes("number")
            with ui.element("div"):
                ui.label(
                    "A click on a head sets what it writes to the factor times what it would; 0 masks it. Another "
                    "click takes that back. A layer's number stands for all its heads."
                ).classes("soft")
                with ui.element("div").classes("inline"):
                    self.factor = ui.number("Factor", value=0, step=0.5).props("outlined dense").classes("number")
                    ui.button("Keep all heads", on_click=self._keep_all, color=None).props("outline")
                with ui.element("div").classes("head-scroll"):
                    self.grid = HeadGrid(self.session.model.cfg.n_layers, self.session.model.cfg.n_heads)
                    self.grid.on("choose", lambda event: self._choose(**event.args))
                vectors = self.session.steering
                self.steering = None if vectors is None else SteeringControl(vectors, self._compare)
        with ui.element("div").classes("inline"):
            self.button = ui.button("Generate", icon="play_arrow", color=None, on_click=self._generate).classes("run")
            self.busy = ui.label("The model is at work …").props("role=status")
        self.error = ui.label().classes("error").props("role=alert")
        self.result = ui.element("section").classes("result").props('aria-label="Result"')
        self.busy.set_visibility(False)
        self._say("")
        self._show_picture()
        self.grid.show(self.factors)

    def _say(self, error: str) -> None:
        self.error.set_text(error)
        self.error.set_visibility(bool(error))

    def _show_picture(self) -> None:
        self.image.set_visibility(self.picture is not None)
        if self.picture is None:
            self.name.set_text("no picture yet")
            return
        size = f"{self.picture.image.width} × {self.picture.image.height} pixels"
        self.name.set_text(f"{self.picture.name}, {size}")
        self.image.props.update(
            src=data_url(self.picture.image), alt=f"{self.picture.name}, what the model is asked about"
        )
        self.image.update()

    # ---------------------------------------------------------------- settings

    async def _uploaded(self, event: Any) -> None:
        self.upload.reset()
        try:
            data = await event.file.read()
            image = await asyncio.to_thread(load_image_bytes, data, event.file.name)
        except ImageError as error:
            self._say(str(error))
            return
        self.picture = Picture(event.file.name, image)
        self._say("")
        self._show_picture()
        self._compare()

    def _rejected(self) -> None:
        self._say(f"a picture may have {MOST_BYTES // 2**20} MB at most: choose an image file that is smaller")

    def _choose(self, layer: int, head: int | None) -> None:
        """Toggle the factor of a head, or of all heads of a layer."""
        factor = self.factor.value
        if factor is None or not math.isfinite(factor):
            self._say("the factor must be a number: 0 masks a head, 0.5 halves what it writes")
            return
        heads = [(layer, head)] if head is not None else [(layer, h) for h in range(self.session.model.cfg.n_heads)]
        if all(self.factors.get(one) == factor for one in heads):
            for one in heads:
                del self.factors[one]
        else:
            self.factors.update(dict.fromkeys(heads, factor))
        self._edited()

    def _keep_all(self) -> None:
        self.factors.clear()
        self._edited()

    def _edited(self) -> None:
        self._say("")
        self.grid.show(self.factors)
        self._compare()

    # ---------------------------------------------------------------- result

    async def _generate(self) -> None:
        try:
            asked = self.asked
        except InputError as error:
            self._say(str(error))
            return
        self._say("")
        self.button.disable()
        self.busy.set_visibility(True)
        try:
            self._show(await asyncio.to_thread(self.session.answer, asked))
        except MENDABLE as error:
            self._say(str(error))
        except torch.OutOfMemoryError:
            self._say("there is not enough memory: choose a smaller picture, or start with --max-pixels")
        except Exception:
            _log.exception("the served page could not answer")
            self._say("something went wrong that should not have: the terminal says more")
        finally:
            self.busy.set_visibility(False)
            self.button.enable()

    def _show(self, shown: Shown) -> None:
        self.shown = shown
        self.pages.pop(self.key, None)
        self.key = secrets.token_urlsafe()
        self.pages[self.key] = shown.page
        self.result.clear()
        with self.result:
            ui.html("Result", tag="h2")
            self.old = ui.label("The settings above have changed since: generate again.").classes("error")
            ui.label(f"Of {shown.asked}").classes("soft asked")
            with ui.element("div").classes("answers"):
                _answer("As the model is", shown.unedited)
                _answer(f"With {shown.asked.edits}", shown.edited)
            frame = ui.element("iframe")
            frame.props.update(
                src=f"/attention/{self.key}",
                sandbox="allow-scripts allow-downloads",
                title="Attention of the edited run",
            )
        self._compare()

    def _compare(self) -> None:
        """Mark the result as outdated if the settings have changed."""
        if self.shown is None:
            return
        try:
            old = self.asked != self.shown.asked
        except InputError:  # half a number: the answer has another one
            old = True
        self.old.set_visibility(old)
        self.result.classes(add="old" if old else "", remove="" if old else "old")


def _answer(heading: str, answer: Answer) -> None:
    with ui.element("div").classes("answer"):
        ui.label(heading).classes("soft")
        ui.html(marked(answer), tag="div").classes("answer-text")
        if not answer.ended:
            ui.label(f"cut off after {len(answer.pieces)} tokens").classes("soft")


def marked(answer: Answer) -> str:
    """An answer as HTML, the tokens that are not in the other one marked."""
    texts = ((html.escape(piece.text), piece.changed) for piece in answer.pieces)
    return "".join(f"<mark>{text}</mark>" if changed else text for text, changed in texts)
