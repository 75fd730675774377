"""`make demo-real` on a tiny checkpoint folder, which it verifies, ranks and draws; without the hub it says so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from whole_folders import save_whole

from hooked_vlm import HookedVLM
from hooked_vlm.interventions import ReplaceImageKV
from tools import real_demo


def test_a_folder_is_verified_ranked_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = save_whole("smolvlm", tmp_path / "model"), tmp_path / "out"
    assert real_demo.main(["--model", str(folder), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "all of it agrees" in shown and "leans most on head" in shown
    assert (out / "where-it-looks.png").stat().st_size > 1000 and (out / "verify.json").exists()
    table = shown[shown.index("change of log-probability\n") :].splitlines()[1 : real_demo.TOP + 1]
    effects = [float(line.split()[1]) for line in table]
    assert len(effects) == real_demo.TOP and effects == sorted(effects)


@torch.no_grad()
def test_the_ranking_is_the_loop_over_heads(tmp_path: Path) -> None:
    model: Any = HookedVLM.from_pretrained(save_whole("smolvlm", tmp_path), device="cpu")
    _, inputs = real_demo.drawing(model, 2)
    assert len(inputs.visuals[0].runs) == 3
    ranking = real_demo.rank(model, inputs)
    inputs = inputs.with_image_features(None)
    plain = model(inputs)[0, -1].log_softmax(-1)
    token = int(plain.argmax())
    assert ranking.baseline == pytest.approx(float(plain[token]), abs=1e-5) and len(ranking.effects) == 12
    behind = tuple(range(inputs.visuals[0].stop, inputs.stop[0]))
    for head in list(ranking.effects)[:2]:
        with model.hooks(ReplaceImageKV((head,), "knockout", queries=(behind,)).hooks(model, inputs)):
            found = float(model(inputs)[0, -1].log_softmax(-1)[token])
        assert ranking.effects[head] == pytest.approx(found - ranking.baseline, abs=1e-4)


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert real_demo.main(["--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"skipped: cannot get '{real_demo.MODEL}' from the hub") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
