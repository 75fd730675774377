"""A picture whose tokens are several runs: one piece of the prompt, tiles and thumbnail as pictures of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_llava import picture
from whole_folders import save_whole

from hooked_vlm import HookedVLM, viewer
from hooked_vlm.analysis.rows import attention_rows
from hooked_vlm.viewer.quantisation import decoded
from hooked_vlm.viewer.scene import scene_of


@torch.no_grad()
def test_tokens_between_tiles_are_named_and_maps_are_those_of_the_tokens(tmp_path: Path) -> None:
    model: Any = HookedVLM.from_pretrained(save_whole("smolvlm", tmp_path), device="cpu")
    inputs = model.to_inputs("what is red?", images=picture(90, 50))
    visual = inputs.visuals[0]
    first = visual.runs[1][0]  # behind the mark and the place of the second tile
    view = viewer.attention(model, inputs, "ab", tokens=[first - 1, first], query="token")
    assert {c.row: c.text for c in view.chips if c.row is not None} == {0: "<row_1_col_2>", 1: f"image token {first}"}
    assert next(c.text for c in view.chips if c.kind == "image") == "image 0: 28 tokens"
    rows = attention_rows(model, inputs.append("ab"), torch.tensor([[first]]))[:, 0, :, 0]
    shown = decoded(view.packed.rows[1], (len(view.layers), len(view.heads), 28), view.packed.zero)[0]
    np.testing.assert_allclose(shown, rows[..., visual.positions].numpy(), atol=0.01)
    panels = scene_of(inputs).panels
    assert [(p.label, p.tokens[0], len(p.boxes), p.tiles) for p in panels] == [
        ("image 0, tiles", 0, 24, (3, 2)),
        ("image 0, thumbnail", 24, 4, (1, 1)),
    ]
    view.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 10_000
