"""`hooked-vlm hooks`."""

import sys

import pytest
import torch
from PIL import Image

from hooked_vlm import HookedVLM, InputError, cli
from hooked_vlm.commands.hooks import HookLine, HooksConfig, answer, hook_lines


def lines_by_name(config: HooksConfig) -> dict[str, HookLine]:
    return {line.name: line for line in hook_lines(config)}


def test_a_known_model_needs_no_files() -> None:
    lines = lines_by_name(HooksConfig("Qwen/Qwen2-VL-72B-Instruct"))
    assert lines["blocks.{l}.attn.hook_z"].shape == ("batch", "pos", 64, 128)
    assert lines["blocks.{l}.attn.hook_k"].shape == ("batch", "pos", 8, 128)
    assert lines["blocks.{l}.attn.hook_pattern"].shape == ("batch", 64, "query", "key")
    assert lines["vision.blocks.{l}.mlp.hook_post"].shape == ("image", "patch", 5120)
    assert lines["hook_image_features"].shape == ("image_token", 8192)
    assert [lines[f"{side}blocks.{{l}}.hook_resid_pre"].n_layers for side in ("", "vision.")] == [80, 32]


@pytest.mark.parametrize("name", ["toy-qwen2-vl", "toy-internvl2"])
def test_by_layer_the_names_are_those_of_the_model(name: str) -> None:
    model = HookedVLM.from_pretrained(name)
    lines = hook_lines(HooksConfig(name, layers=True))
    assert {line.name for line in lines} == set(model.hook_dict) and len(lines) == len(model.hook_dict)


@pytest.mark.parametrize("family", ["toy-qwen2-vl", "toy-internvl2"])
@torch.no_grad()
def test_shapes_are_those_of_a_run(family: str) -> None:
    model = HookedVLM.from_pretrained(family)
    _, cache = model.run_with_cache(model.to_inputs("what", images=Image.new("RGB", (64, 64))))
    checked = 0
    for line in hook_lines(HooksConfig(family, layers=True)):
        if line.name in cache:
            numbers = [(got, size) for got, size in zip(cache[line.name].shape, line.shape, strict=True)]
            assert all(got == size for got, size in numbers if isinstance(size, int)), line
            checked += any(isinstance(size, int) for _, size in numbers)
    assert checked > 100


def test_towers_and_words_are_picked() -> None:
    lines = hook_lines(HooksConfig("toy-internvl2", tower="vision", grep="residual stream", layers=True))
    assert {line.name.split(".")[-1] for line in lines} == {"hook_resid_pre", "hook_resid_post"}
    assert len(lines) == 6 and {line.tower for line in lines} == {"vision"}
    projector = hook_lines(HooksConfig("toy-qwen2-vl", tower="projector"))
    assert [line.name for line in projector][-1] == "hook_image_features" and len(projector) == 6
    assert len(hook_lines(HooksConfig("toy-qwen2-vl", grep="HOOK_Z$"))) == 2


def test_the_printed_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", "hooks", "toy-qwen2-vl", "--grep", "hook_z$"])
    cli.main()
    _, vision, about, text, _ = capsys.readouterr().out.splitlines()
    assert vision.split() == ["vision.blocks.{l}.attn.hook_z", "[image,", "patch,", "4,", "24]"]
    assert about.startswith("    ") and "3 layers" in about and "fires once" in about
    assert text.split() == ["blocks.{l}.attn.hook_z", "[batch,", "pos,", "4,", "48]"]
    _, told = answer(HooksConfig("toy-qwen2-vl", grep="hook_z$"))
    assert told[1]["shape"] == ("batch", "pos", 4, 48) and told[1]["tower"] == "language" and told[1]["n_layers"] == 4


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("name", ["toy-qwen2-vl", "Qwen/Qwen2-VL-72B-Instruct"])
def test_the_printed_table_fits_80_columns_and_tells_all(name: str, layers: bool) -> None:
    text, told = answer(HooksConfig(name, layers=layers))
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert all(line["name"] in words and line["what"] in words and line["fires"] in words for line in told)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"grep": "("}, "--grep"), ({"grep": "zzz"}, "'zzz'")],
)
def test_mistakes(settings: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        hook_lines(HooksConfig("toy-qwen2-vl", **settings))  # pyright: ignore[reportArgumentType]
