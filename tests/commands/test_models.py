"""`hooked-vlm models` and the page made from it."""

import json
import sys
from pathlib import Path

import pytest

from hooked_vlm import cli
from hooked_vlm.analysis.text_tables import in_width
from hooked_vlm.commands.models import GPU_SIZES, ModelsConfig, answer, model_row
from hooked_vlm.converters import KNOWN_MODELS
from hooked_vlm.loading.folders import TOY_MODELS
from tools.checkpoint_page import page

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "checkpoints.md"
QWEN = "Qwen/Qwen2-VL-2B-Instruct"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", *arguments])
    cli.main()


@pytest.mark.slow
def test_the_docs_page_is_what_the_command_makes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tools.checkpoint_page"


def test_one_model_by_hand() -> None:
    row = model_row(QWEN, ModelsConfig(tokens=1000))
    assert (row.n_layers, row.n_heads, row.n_key_value_heads, row.vision_layers, row.vision_heads) == (
        28,
        12,
        2,
        32,
        16,
    )
    assert row.n_params == 2_208_985_600 and row.weights_bfloat16 == 4_417_971_200
    assert row.kv_cache_per_1000_tokens == row.plan.kv_cache == 1000 * 2 * 28 * 2 * 128 * 2
    assert row.image_tokens == round(768 / 28) * round(1024 / 28)
    assert row.needed == row.plan.weights + row.plan.kv_cache + row.plan.activations
    more = model_row(QWEN, ModelsConfig(tokens=1000, gradients=True))
    streams = 28 * 1000 * 1536 * 2 + 32 * 4 * row.image_tokens * 1280 * 2  # hook_resid_pre of both towers
    assert more.needed == row.needed + 2 * (row.plan.full_cache + streams) + row.plan.weights


def test_a_shorter_context_bounds_the_prompt() -> None:
    assert model_row("toy-qwen2-vl", ModelsConfig()).n_tokens == 1024
    assert model_row("OpenGVLab/InternVL2-40B", ModelsConfig(tokens=9000)).n_tokens == 4096


def test_a_folder_is_described_without_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS[QWEN].config))
    known, folder = model_row(QWEN, ModelsConfig()), model_row(str(tmp_path), ModelsConfig())
    assert folder.plan == known.plan and folder.gpus == known.gpus
    assert "its own config.json" in answer(ModelsConfig(model=str(tmp_path)))[0]
    toy = model_row(str(TOY_MODELS / "toy-qwen2-vl"), ModelsConfig())
    assert toy.image_tokens == model_row("toy-qwen2-vl", ModelsConfig()).image_tokens == 234


@pytest.mark.slow
def test_the_table_and_its_data_name_the_same() -> None:
    table, rows = answer(ModelsConfig(tokens=2000, full_cache=True))
    names = [row["name"] for row in rows]
    assert names == ["toy-internvl2", "toy-qwen2-vl", *KNOWN_MODELS]
    assert [line.split()[0] for line in table.splitlines()[1 : 1 + len(names)]] == names
    largest = next(row for row in rows if "72B" in row["name"])
    gpus = [largest["gpus"][str(size)] for size in GPU_SIZES]
    line = next(line for line in table.splitlines() if "72B" in line)
    assert line.split()[-1] == "/".join(map(str, gpus)) and gpus == sorted(gpus, reverse=True)
    shown = in_width(table).splitlines()
    assert max(map(len, shown)) <= 80
    assert shown[: len(names) + 1] == table.splitlines()[: len(names) + 1], "its rows fit"


def test_one_model_as_text_and_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    call(monkeypatch, "models", "toy-qwen2-vl")
    assert "4 layers, 4 heads, 2 key-value heads" in capsys.readouterr().out
    call(monkeypatch, "models", "toy-qwen2-vl", "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "toy-qwen2-vl" and row["weights_float32"] == 4 * row["n_params"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nowhere"], "nowhere"), (["--tokens", "0"], "--tokens")],
)
def test_mistakes(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=words):
        call(monkeypatch, "models", *arguments)
