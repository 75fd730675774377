"""The served page without its browser: what is asked, what is answered, who may ask."""

import asyncio
import html
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hooked_vlm import HookedVLM, ImageError, InputError, cli, viewer
from hooked_vlm.toys.pages import make_page
from hooked_vlm.viewer.guard import Guard
from hooked_vlm.viewer.session import Asked, Picture, Session, compared, intervention

FAMILIES = ["toy-qwen2-vl", "toy-internvl2"]
LINE = 2
READING = (((2, 0), 0), ((2, 1), 0))
"""The heads of toy-qwen2-vl that copy characters out of the picture, masked."""

loaded = lru_cache(HookedVLM.from_pretrained)


def asked(factors: tuple = (), n_tokens: int | None = 8) -> tuple[Asked, Any]:
    page = make_page(np.random.default_rng(7), n_lines=4)
    return Asked(Picture("page.png", page.image), page.question(LINE), n_tokens, factors), page


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factors", [(), READING, (((1, 3), 0.5), ((2, 0), 0), ((2, 1), 0.5), ((3, 0), -2.0))])
def test_answers_are_those_of_the_model_with_z_multiplied(family: str, factors: tuple) -> None:
    model = loaded(family)
    question, page = asked(factors)
    shown = Session(model).answer(question)
    inputs = model.to_inputs(page.question(LINE), images=page.image)

    def scale(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        for (layer, head), factor in factors:
            if layer == hook.layer():
                z[:, :, head] *= factor
        return z

    by_hand = [(f"blocks.{layer}.attn.hook_z", scale) for layer in range(model.cfg.n_layers)]
    assert shown.unedited.text == model.generate(inputs, 8, return_type="str")
    edited = model.generate(inputs, 8, fwd_hooks=by_hand)
    assert shown.edited.text == model.generate(inputs, 8, fwd_hooks=by_hand, return_type="str")
    assert shown.edited.ended == (int(edited[0, -1]) in model.cfg.eos_token_ids)
    assert shown.asked is question
    view = viewer.attention(model, inputs, edited[:, inputs.shape[1] :], images=page.image, fwd_hooks=by_hand)
    assert replace(view, title=f"Where the model looks: {question.edits}").html == shown.page


def test_masking_the_heads_that_read_changes_the_answer_and_others_do_not() -> None:
    session = Session(loaded("toy-qwen2-vl"))
    question, page = asked(READING)
    shown = session.answer(question)
    assert shown.unedited.text == page.lines[LINE].value != shown.edited.text
    assert all(piece.changed for piece in shown.edited.pieces)
    other = session.answer(asked((((0, 0), 0),))[0])
    assert other.edited.text == page.lines[LINE].value
    assert not any(piece.changed for piece in (*other.edited.pieces, *other.unedited.pieces))
    cut = session.answer(asked(n_tokens=2)[0]).unedited
    assert (cut.text, cut.ended) == (page.lines[LINE].value[:2], False)


def test_two_answers_are_compared_token_by_token() -> None:
    """Tokens are bytes of UTF-8 here; 0 ends an answer."""
    model: Any = SimpleNamespace(
        cfg=SimpleNamespace(eos_token_ids=(0,)), to_string=lambda ids: bytes(ids).decode(errors="replace")
    )
    first, second = compared(model, [*b"a cat", 0], [*"a cét".encode()])
    assert [(p.text, p.changed) for p in first.pieces] == [
        ("a", False), (" ", False), ("c", False), ("a", True), ("t", False)
    ]  # fmt: skip
    assert [(p.text, p.changed) for p in second.pieces[3:]] == [("", True), ("é", True), ("t", False)]
    assert (first.ended, second.ended) == (True, False)
    assert second.text == "a cét"
    assert compared(model, [*b"a", 0xC3], [])[0].text == "a\N{REPLACEMENT CHARACTER}"


def test_heads_of_one_factor_are_edited_together() -> None:
    parts = intervention((((0, 1), 0.5), ((2, 0), 0), ((2, 1), 0.5))).parts  # type: ignore[attr-defined]
    assert sorted(map(str, parts)) == ["ScaleHeads 0.1 2.1", "ZeroHeads 2.0"]


def test_settings_are_equal_only_if_all_of_them_are() -> None:
    question, _ = asked(READING)
    assert question == replace(question) and str(question) == (
        "page.png · “What is the value of pu?” · at most 8 tokens · 2.0 × 0, 2.1 × 0"
    )
    assert question.picture is not None
    for change in (
        {"picture": Picture("page.png", question.picture.image)},
        {"prompt": "?"},
        {"max_new_tokens": 7},
        {"factors": ()},
    ):
        assert replace(question, **change) != question


def test_what_cannot_be_answered_is_refused() -> None:
    session = Session(loaded("toy-qwen2-vl"))
    question, _ = asked()
    for change, words in (
        ({"picture": None}, "no picture"),
        ({"prompt": " "}, "prompt"),
        ({"max_new_tokens": None}, "512.*None"),
        ({"max_new_tokens": 513}, "512.*513"),
        ({"factors": (((2, 4), 0),)}, r"2\.4"),
    ):
        with pytest.raises(InputError, match=words):
            session.answer(replace(question, **change))
    with pytest.raises(ImageError, match="300 x 1 "):
        session.answer(replace(question, picture=Picture("line.png", Image.new("RGB", (300, 1)))))
    assert session.answer(question).unedited.text  # a refusal leaves the session free


def test_the_model_is_asked_by_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(loaded("toy-qwen2-vl"))
    generate, free = session.model.generate, []

    def watched(*arguments: Any, **settings: Any) -> Any:
        free.append(session._alone.acquire(blocking=False))
        return generate(*arguments, **settings)

    monkeypatch.setattr(session.model, "generate", watched)
    session.answer(asked(READING)[0])
    assert free == [False, False]


# ---------------------------------------------------------------- who may ask


def answered(kind: str = "http", **headers: str) -> list[dict[str, Any]]:
    """What a client sees of an app behind the guard."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": []}
        await send(start if scope["type"] == "http" else {"type": "websocket.accept"})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Guard(app, most_bytes=1000)({"type": kind, "headers": given}, None, send))
    return sent


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "127.0.0.1"])
def test_our_own_page_may_speak(host: str) -> None:
    (start,) = answered(host=host, origin=f"http://{host}", content_length="1000")
    assert start["status"] == 200
    policy = dict(start["headers"])[b"content-security-policy"].decode()
    assert policy.startswith("default-src 'self'") and "http" not in policy
    assert answered("websocket", host=host, origin=f"http://{host}") == [{"type": "websocket.accept"}]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 403),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "127.0.0.1@evil.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "localhost:8000", "origin": "http://evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:9000"}, 403),
        ({"host": "localhost:8000", "origin": "null"}, 403),
        ({"host": "localhost:8000", "content_length": "1001"}, 413),
        ({"host": "localhost:8000", "content_length": "-1"}, 413),
        ({"host": "localhost:8000", "transfer_encoding": "chunked"}, 411),
    ],
)
def test_others_may_not(headers: dict[str, str], status: int) -> None:
    start, _ = answered(**headers)
    assert start["status"] == status
    assert [message["type"] for message in answered("websocket", **headers)] == ["websocket.close"]


# ---------------------------------------------------------------- the command


def test_the_command_begins_with_what_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serve = pytest.importorskip("hooked_vlm.viewer.server", reason="NiceGUI is not installed")
    served: list[Any] = []
    monkeypatch.setattr(serve, "serve", lambda *arguments: served.append(arguments))

    def call(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["hooked-vlm", "view", "--serve", "--no-open", *arguments])
        cli.main()
        return served[-1]

    session, start, port, opens = call()
    assert session.model.cfg.n_layers == 4 and (port, opens) == (0, False)
    assert start.prompt == "What is the value of pu?" and start.picture.image.size == (128, 112)
    Image.new("L", (40, 30)).save(tmp_path / "grey.png")
    _, start, port, _ = call("--image", str(tmp_path / "grey.png"), "--prompt", "?", "--port", "8000")
    assert (start.picture.name, start.picture.image.mode, start.prompt, port) == ("grey.png", "RGB", "?", 8000)
    n_served = len(served)
    for arguments, words in (
        (["--answer", "x"], "--answer"),
        (["--image", "a", "b"], "--serve.*2"),
        (["--image", str(tmp_path / "none.png")], r"none\.png"),
    ):
        with pytest.raises(SystemExit, match=words):
            call(*arguments)
    monkeypatch.setattr("hooked_vlm.commands.view.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"hooked-vlm\[serve\]"):
        call()
    assert len(served) == n_served


def test_a_port_that_is_taken_is_named() -> None:
    serve = pytest.importorskip("hooked_vlm.viewer.server", reason="NiceGUI is not installed")
    with serve._listening(0) as listener:
        address, port = listener.getsockname()
        assert address == "127.0.0.1"
        with pytest.raises(InputError, match=f"port {port}"):
            serve._listening(port)
    with pytest.raises(InputError, match="port 70000"):
        serve._listening(70000)


def test_an_answer_cannot_break_out_of_the_page() -> None:
    serve = pytest.importorskip("hooked_vlm.viewer.server", reason="NiceGUI is not installed")
    model: Any = SimpleNamespace(cfg=SimpleNamespace(eos_token_ids=()), to_string=lambda ids: bytes(ids).decode())
    evil, plain = b"<img src=x onerror=alert(1)>", b"<img>"
    found = [serve.marked(said) for said in compared(model, [*evil], [*plain])]
    assert found[1] == html.escape("<img>")
    assert "<" not in found[0].replace("<mark>", "").replace("</mark>", "")
