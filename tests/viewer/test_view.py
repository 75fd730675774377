"""The page: what it holds equals what the model did, and nothing in it reaches outside."""

import html
import json
import re
import sys
from dataclasses import replace
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import model_and_inputs

from hooked_vlm import HookedVLM, InputError, cli, viewer
from hooked_vlm.errors import OutputError
from hooked_vlm.interventions import ZeroHeads
from hooked_vlm.lens import logit_lens
from hooked_vlm.metrics import log_prob
from hooked_vlm.patching import Pair, masked, patch
from hooked_vlm.toys.pages import make_page
from hooked_vlm.viewer.attention_view import text_columns
from hooked_vlm.viewer.quantisation import decoded

FAMILIES = ["toy-qwen2-vl", "toy-internvl2"]


loaded = lru_cache(HookedVLM.from_pretrained)


def asked(family: str, size: tuple[int, int] = (128, 112), n_pictures: int = 1) -> tuple[Any, Any, Any]:
    """A model, a page of text and the question about its second line."""
    model = loaded(family)
    page = make_page(np.random.default_rng(3), n_lines=3, size=size)
    return model, page, model.to_inputs(page.question(1), images=[page.image] * n_pictures)


def shown(view: viewer.View, row: int) -> tuple[np.ndarray, np.ndarray]:
    """What the page reads: values [layer, head, token] and shares [layer, head] of a row."""
    shape = (len(view.layers), len(view.heads), view.scene.n_tokens)
    return decoded(view.packed.rows[row], shape, view.packed.zero)


def check_equal(view: viewer.View, row: int, expected: Any) -> None:
    """Up to the rounding the page admits."""
    found, expected = shown(view, row)[0], np.asarray(expected)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    largest = np.nanmax(np.abs(expected), -1, keepdims=True, initial=0.0)
    assert (np.nan_to_num(np.abs(found - expected)) <= view.packed.error * largest * 1.01 + 1e-6).all()


class Elements(HTMLParser):
    """Tags with their attributes, and the text of the scripts by id."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.tags[-1] if self.tags else ("", {})
        if tag == "script":
            name = str(attributes.get("id"))
            self.scripts[name] = self.scripts.get(name, "") + data


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "n_pictures"), [((128, 112), 2), ((256, 128), 1)])
def test_maps_equal_the_pattern(family: str, size: tuple[int, int], n_pictures: int) -> None:
    model, _, inputs = asked(family, size, n_pictures)
    view = viewer.attention(model, inputs, "w0")
    whole = inputs.append("w0")
    _, cache = model.run_with_cache(whole)
    images = torch.cat([inputs.image_tokens(i) for i in range(n_pictures)])
    n = whole.shape[1]
    for row, query in enumerate((n - 3, n - 2)):  # a token shows the position it was predicted from
        pattern = torch.stack([cache["pattern", layer][0, :, query] for layer in range(model.cfg.n_layers)])
        check_equal(view, row, pattern[..., images])
        others = torch.ones(n, dtype=torch.bool)
        others[images] = False
        np.testing.assert_allclose(shown(view, row)[1], pattern[..., others].sum(-1), atol=1e-5)
    assert [(c.text, c.row) for c in view.chips if c.kind == "answer"] == [("w", 0), ("0", 1)]


@pytest.mark.parametrize("query", ["producing", "token"])
def test_text_tokens_have_the_weights_of_the_pattern(family: str, query: Any) -> None:
    """In every family, for each token that can be chosen: each text token its weight, and all weights together 1."""
    model, inputs = model_and_inputs(family, "one image")
    whole = inputs.append(torch.tensor([[7, 8]]))
    view = viewer.attention(model, whole, query=query)
    _, cache = model.run_with_cache(whole)
    patterns = torch.stack([cache["pattern", layer][0] for layer in range(model.cfg.n_layers)])
    on_text = text_columns(whole)
    inside = {pos for visual in whole.visuals for pos in range(visual.start, visual.stop)}
    assert on_text == [pos for pos in range(whole.shape[1]) if pos not in inside]
    chosen = [pos for pos in on_text if pos or query == "token"]
    of_row = [*chosen[-2:], *chosen[:-2]]  # the answer first
    assert view.text is not None and len(view.text.rows) == len(view.packed.rows) == len(of_row)
    text_chips = [chip for chip in view.chips if chip.column is not None]
    assert [chip.column for chip in text_chips] == list(range(len(on_text)))
    assert [chip.row for chip in text_chips if chip.row is not None] == [of_row.index(pos) for pos in chosen]
    shape = (model.cfg.n_layers, model.cfg.n_heads, len(on_text))
    for row, pos in enumerate(of_row):
        expected = patterns[:, :, pos - (query == "producing")].numpy()
        found = decoded(view.text.rows[row], shape, view.text.zero)[0]
        largest = expected[..., on_text].max(-1, keepdims=True)
        assert (np.abs(found - expected[..., on_text]) <= view.text.error * largest * 1.01 + 1e-6).all()
        on_images, elsewhere = shown(view, row)
        np.testing.assert_allclose(np.nansum(on_images, -1) + elsewhere, 1, atol=0.01)
        assert (found.sum(-1) <= elsewhere + 0.01).all()


def test_a_large_page_has_the_answers_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, inputs = asked("toy-qwen2-vl")
    n_text = len(text_columns(inputs.append("w0")))
    values = (n_text - 1) * model.cfg.n_layers * model.cfg.n_heads * (56 + n_text)  # nothing predicted the first token
    for most, n_rows in ((values, n_text - 1), (values - 1, 2)):
        monkeypatch.setattr("hooked_vlm.viewer.attention_view.SMALL", most)
        view = viewer.attention(model, inputs, "w0")
        assert len(view.packed.rows) == n_rows
        assert [chip.text for chip in view.chips if chip.row in (0, 1)] == ["w", "0"]


def test_the_page_says_what_it_is_about() -> None:
    model, page, inputs = asked("toy-internvl2")
    about = [("model", "toy-internvl2"), ("prompt", page.question(1)), ("answer", page.lines[1].value)]
    view = viewer.attention(model, inputs)
    assert list(view.facts) == about
    for name, text in about:
        assert f"<dt>{name}</dt><dd>{text}</dd>" in view.html
    targets = model.to_tokens(page.lines[1].value)[0].tolist()
    assert list(viewer.lens(model, inputs, logit_lens(model, inputs, "image", targets=targets)).facts) == about[:2]
    assert list(viewer.vision_attention(model, inputs, patches=[0], layers=[0]).facts) == about[:1]
    numbers = np.zeros(len(inputs.image_tokens(0)), np.float32)
    assert list(viewer.values(inputs, numbers).facts) == about[1:2]


def test_without_an_answer_the_models_own_is_shown() -> None:
    model, page, inputs = asked("toy-qwen2-vl")
    view = viewer.attention(model, inputs)
    text = "".join(c.text for c in view.chips if c.kind == "answer")
    assert text.removesuffix("<|im_end|>") == model.generate(inputs, 8, return_type="str") == page.lines[1].value
    again = viewer.attention(model, inputs.append(page.lines[1].value))
    assert len([c for c in again.chips if c.kind == "answer"]) == 4
    for row in range(4):
        check_equal(again, row, shown(view, row)[0])


def test_a_token_may_show_its_own_attention() -> None:
    model, _, inputs = asked("toy-qwen2-vl")
    last = inputs.shape[1] - 1
    own = viewer.attention(model, inputs, "w", tokens=[last, last - 1], query="token")
    produced = viewer.attention(model, inputs, "w")
    assert [c.row for c in own.chips if c.row is not None] == [0, 1]
    check_equal(own, 1, shown(produced, 0)[0])
    position = int(inputs.image_tokens(0)[5])
    chip = next(c for c in viewer.attention(model, inputs, "w", tokens=[position]).chips if c.row == 0)
    assert chip.text == f"image token {position}"


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_under_hooks_equal_the_pattern_under_hooks(family: str) -> None:
    model, _, inputs = asked(family)
    hooks = ZeroHeads(((1, 0), (2, 1))).hooks(model, inputs)
    view = viewer.attention(model, inputs, "w0", fwd_hooks=hooks)
    whole = inputs.append("w0")
    kept: dict[str, torch.Tensor] = {}
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    reading = [(name, lambda pattern, hook: kept.update({hook.name: pattern.detach()})) for name in names]
    model.run_with_hooks(whole, fwd_hooks=[*hooks, *reading])
    plain = viewer.attention(model, inputs, "w0")
    for row, query in enumerate((whole.shape[1] - 3, whole.shape[1] - 2)):
        check_equal(view, row, torch.stack([kept[name][0, :, query] for name in names])[..., inputs.image_tokens(0)])
    edited, unedited = shown(view, 0)[0], shown(plain, 0)[0]
    assert np.abs(edited[2:] - unedited[2:]).max() > 0.05  # layers above a masked head look elsewhere
    generated = viewer.attention(model, inputs, fwd_hooks=hooks, max_new_tokens=4)
    text = "".join(chip.text for chip in generated.chips if chip.kind == "answer")
    assert text.startswith(model.generate(inputs, 4, fwd_hooks=hooks, return_type="str"))


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(InputError, match=r"tiles of image 1.*to_inputs"):
        viewer.attention(*model_and_inputs("internvl2", "two images"), torch.tensor([[7]]))
    model, page, inputs = asked("toy-qwen2-vl")
    for arguments, words in (
        ({"inputs": model.to_inputs([page.question(0)] * 2, images=[page.image] * 2)}, "batch of 2"),
        ({"inputs": model.to_inputs("hello")}, "no image"),
        ({"heads": [(2, 4)]}, r"2\.4.*4.*4"),
        ({"tokens": [0]}, "token 0.*1"),
        ({"tokens": []}, "tokens"),
        (
            {"fwd_hooks": [("blocks.1.attn.hook_pattern", print)]},
            r"blocks\.1\.attn\.hook_pattern",
        ),
        (
            {"fwd_hooks": [(lambda name: "scores" in name, print)]},
            r"blocks\.0\.attn\.hook_attn_scores",
        ),
        ({"answer": torch.zeros(1, 0, dtype=torch.long)}, "answer="),
    ):
        with pytest.raises(InputError, match=words):
            viewer.attention(model, **{"inputs": inputs, "answer": "w", **arguments})


# ---------------------------------------------------------------- the vision tower


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_equal_the_towers_pattern(family: str) -> None:
    model, page, _ = asked(family, (256, 128))
    inputs = model.to_inputs("Read.", images=[page.image, page.image])
    _, cache = model.run_with_cache(inputs)
    tiled = model.cfg.vision.class_token
    n_patches = inputs.image_grid(1).n_tokens * 4
    asked_for = [0, 17, n_patches - 1]
    view = viewer.vision_attention(model, inputs, image=1, patches=asked_for)
    for row, patch_number in enumerate(asked_for):
        expected = np.full((model.cfg.vision.n_layers, model.cfg.vision.n_heads, n_patches), np.nan, np.float32)
        if tiled:  # 256 patches to a tile behind a class token, three tiles to an image
            tile, at = divmod(patch_number, 256)
            where, query, keys = 3 + tile, 1 + at, np.arange(1, 257)
            columns = 256 * tile + np.arange(256)
        else:  # merge block by merge block
            _, line, col = inputs.image_grid(1).patch_order().T
            columns = line * 32 + col
            where, query, keys = 1, int(np.flatnonzero(columns == patch_number)[0]), np.arange(n_patches)
        for layer in range(model.cfg.vision.n_layers):
            pattern = cache.vision["pattern", layer][where, :, query]
            expected[layer][:, columns] = pattern[:, keys]
            if tiled:
                np.testing.assert_allclose(shown(view, row)[1][layer], pattern[:, 0], atol=1e-5)
        check_equal(view, row, expected)
    assert view.unit == "patch" and view.text is None
    boxes = [box for _, box in view.picks]
    assert boxes[0][:2] == (0, 0) and boxes[-1][2:] == (256, 128)
    with pytest.raises(InputError, match=f"patch {n_patches}"):
        viewer.vision_attention(model, inputs, patches=[n_patches])


# ---------------------------------------------------------------- other values


def test_any_numbers_are_laid_by_their_axes() -> None:
    _, _, inputs = asked("toy-qwen2-vl")
    n = len(inputs.image_tokens(0))
    numbers = np.random.default_rng(0).normal(size=(3, 2, n)).astype(np.float32)
    numbers[0, 1, 3] = np.nan
    view = viewer.values(inputs, numbers, ("head", "layer"), heads=["a", "b", "c"], quantity="effect")
    assert (view.layers, view.heads) == (("0", "1"), ("a", "b", "c"))
    check_equal(view, 0, numbers.transpose(1, 0, 2))
    plain = viewer.values(inputs, torch.from_numpy(numbers[0, 0]))
    check_equal(plain, 0, numbers[0, 0][None, None])
    assert (plain.layers, plain.heads) == (("",), ("",))  # values of no layer or head: nothing to choose
    refused: Any = (
        (("head",), {}, "axes"),
        (("head", "layer"), {"layers": [0]}, r"\[1, 1, 3, 56\].*\[1, 2, 3, 56\]"),
        (("row", "layer"), {"rows": [0]}, "1.*3 rows"),
    )
    for axes, labels, words in refused:
        with pytest.raises(InputError, match=words):
            viewer.values(inputs, numbers, axes, **labels)
    with pytest.raises(InputError, match=r"56.*55"):
        viewer.values(inputs, numbers[..., 1:], ("head", "layer"))


def test_a_logit_lens_is_shown() -> None:
    model, page, inputs = asked("toy-qwen2-vl")
    targets = model.to_tokens(page.lines[1].value)[0].tolist()
    found = logit_lens(model, inputs, "image", targets=targets)
    view = viewer.lens(model, inputs, found)
    assert "".join(c.text for c in view.chips) == page.lines[1].value and len(view.layers) == 5
    for row in range(len(targets)):
        check_equal(view, row, np.exp(found.target_log_probs[..., row])[:, None])
    with pytest.raises(InputError, match="logit_lens"):
        viewer.lens(model, inputs, logit_lens(model, inputs, "final", targets=targets))


def test_patching_effects_are_shown() -> None:
    model, page, inputs = asked("toy-qwen2-vl")
    pair = Pair(inputs, inputs.with_image(0, masked(page.image, page.lines[1].value_box)), {})
    answer = int(model.to_tokens(page.lines[1].value)[0, 0])
    result = patch(model, pair, "resid_pre", log_prob(answer), where="each", layers=[2])
    view = viewer.patching(inputs, result)
    columns = [result.axes["place"].index(int(pos)) for pos in inputs.image_tokens(0)]
    assert view.layers == ("2",)
    check_equal(view, 0, result.mean[:, columns][:, None])
    with pytest.raises(InputError, match='where="each"'):
        viewer.patching(inputs, replace(result, axes={**result.axes, "place": tuple(map(str, result.axes["place"]))}))


# ---------------------------------------------------------------- the page


def test_texts_cannot_break_out_of_the_page() -> None:
    model, _, inputs = asked("toy-qwen2-vl")
    evil = "</script><img src=x onerror=alert(1)>"
    numbers = np.zeros((1, len(inputs.image_tokens(0))), np.float32)
    view = viewer.values(inputs, numbers, ("row",), rows=[evil], title=evil, note=evil, quantity=evil)
    elements = Elements(view.html)
    assert "img" not in [tag for tag, _ in elements.tags]
    assert json.loads(elements.scripts["data"])["chips"][0]["text"] == evil
    answered = viewer.attention(model, inputs, "</script>", title="a < b")
    assert "".join(c["text"] for c in json.loads(Elements(answered.html).scripts["data"])["chips"]).endswith(
        "</script>"
    )


def test_nothing_in_the_page_reaches_outside() -> None:
    model, page, inputs = asked("toy-qwen2-vl")
    view = viewer.attention(model, inputs, "w", [(2, 1)], [page.lines[1].value_box])
    elements = Elements(view.html)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in elements.tags}
    assert not {"src", "href", "action", "srcset"} & {name for _, attributes in elements.tags for name in attributes}
    policy = next(a["content"] for _, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'")
    without_data = re.sub(r'"src": "data:[^"]*"', "", view.html)
    assert not re.search(r"https?:|//\w+\.|@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|import\(", without_data)
    data = json.loads(elements.scripts["data"])
    assert data["ranked"] == [[2, 1]] and data["pictures"][0]["evidence"] == [list(page.lines[1].value_box)]
    assert len(data["colours"]) == 256 and data["colours"][0] == "#440154" and data["colours"][-1] == "#fde725"


def test_a_notebook_shows_the_page_and_a_file_holds_it(tmp_path: Path) -> None:
    _, _, inputs = asked("toy-qwen2-vl")
    view = viewer.values(inputs, np.zeros(len(inputs.image_tokens(0)), np.float32))
    (frame,) = [attributes for tag, attributes in Elements(view._repr_html_()).tags if tag == "iframe"]
    assert frame["srcdoc"] == view.html
    assert html.unescape(view.title) == frame["title"]
    assert view.save(tmp_path / "new" / "page.html").read_text(encoding="utf-8") == view.html
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="/file"):
        view.save(tmp_path / "file" / "page.html")


# ---------------------------------------------------------------- the command


def test_the_command_writes_and_opens_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    page, out = make_page(np.random.default_rng(3), n_lines=3), tmp_path / "page.html"
    page.image.save(tmp_path / "page.png")
    common = ["view", "--image", str(tmp_path / "page.png"), "--prompt", page.question(1), "--out", str(out)]

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["hooked-vlm", *common, *arguments])
        cli.main()
        return capsys.readouterr().out

    assert call("--heads", "2.1", "2.0", "--box", "1", "2", "30", "40") == f"page: {out}\n"
    assert opened == [out.resolve().as_uri()]
    data = json.loads(Elements(out.read_text(encoding="utf-8")).scripts["data"])
    assert data["ranked"] == [[2, 1], [2, 0]] and data["pictures"][0]["evidence"] == [[1, 2, 30, 40]]
    kept = out.read_text(encoding="utf-8")
    for arguments, words in (
        (["--heads", "2-1"], "'2-1'"),
        (["--box", "1", "2", "3"], "--box"),
        (["--image", str(tmp_path / "none.png")], "none.png"),
        (["--box", "500", "2", "510", "4"], "(500, 2, 510, 4)"),
    ):
        with pytest.raises(SystemExit, match=re.escape(words)):
            call("--no-open", *arguments)
    assert out.read_text(encoding="utf-8") == kept and len(opened) == 1
    call("--no-open", "--tower", "vision")
    assert "vision tower" in out.read_text(encoding="utf-8") and len(opened) == 1
