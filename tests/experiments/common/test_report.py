"""The report page: self-contained, escaped, complete, the same on every run."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.experiments.common.figures import new_figure
from hooked_vlm.experiments.common.report import Report
from hooked_vlm.model.fingerprints import provenance, weights_hash


def write(out: Path) -> str:
    report = Report("Title <b>", "lead")
    report.section("First", "One & two.")
    figure = new_figure(2, 2)
    figure.subplots().plot([1, 2])
    report.figure("line", figure, "A line")
    frame = pd.DataFrame({"head": ["0.1", "<script>"], "score": [0.25, np.nan], "n": [1200, 3], "ok": [True, False]})
    report.table("scores", frame, "Scores", shown=1)
    report.table("all", frame, "All")
    return report.write(out, {"seed": 0}).read_text(encoding="utf-8")


def test_page(tmp_path: Path) -> None:
    page = write(tmp_path / "a")
    assert "Title &lt;b&gt;" in page
    assert "<script>" not in re.sub(r"<script>\nfor .*?</script>", "", page, flags=re.DOTALL)
    assert "(1 of 2 rows)" in page
    assert "1,200" in page
    assert "data:image/png;base64," in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)  # nothing is fetched
    assert json.loads((tmp_path / "a" / "run.json").read_text()) == {"seed": 0}
    assert len(pd.read_parquet(tmp_path / "a" / "tables" / "scores.parquet")) == 2
    names = {path.name for path in (tmp_path / "a" / "figures").iterdir()}
    assert names == {"line.png", "line.svg"}


def test_written_twice_is_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_the_hash_stands_for_the_weights() -> None:
    model = HookedVLM.from_pretrained("toy-qwen2-vl")
    first = weights_hash(model)
    assert first == weights_hash(HookedVLM.from_pretrained("toy-qwen2-vl"))
    assert provenance(model)["weights"] == first
    with torch.no_grad():
        weight = model.blocks[1].mlp.gate.weight if hasattr(model.blocks[1].mlp, "gate") else model.embed.weight
        weight[[0, 1]] = weight[[1, 0]].clone()  # two rows exchanged
    assert weights_hash(model) != first
