"""The study on checkpoint folders of later families: places that are seen twice, or not at all."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from whole_folders import save_whole, teach

from hooked_vlm import HookedVLM
from hooked_vlm.errors import GeometryError
from hooked_vlm.experiments.ocr_heads import MaskConfig, Protocol, ScoreConfig, head_scores, run
from hooked_vlm.experiments.ocr_heads.data.scored import toy_pages
from hooked_vlm.experiments.ocr_heads.examples import Evidence, Example, to_inputs
from hooked_vlm.experiments.ocr_heads.head_scores import looks
from hooked_vlm.experiments.ocr_heads.scoring import find_copies
from hooked_vlm.experiments.ocr_heads.sink_redistribution import first_token
from hooked_vlm.experiments.ocr_heads.study import Study

SMALL: dict[str, Any] = {
    "samples": 3, "data": "toy", "max_new_tokens": 8, "device": "cpu", "quiet": True,
}  # fmt: skip
STITCHED = ("llava-onevision", "llava-next")


def reply_of(model: Any, example: Example) -> list[int]:
    return model.tokenizer(example.answer, add_special_tokens=False)["input_ids"]


def taught(family: str, folder: Path, n: int = 3) -> HookedVLM:
    """A model that reads the first pages."""
    model = HookedVLM.from_pretrained(save_whole(family, folder), device="cpu")
    pages = toy_pages(0, n, False)
    end = model.cfg.eos_token_ids[0]
    teach(model, [(to_inputs(model, [page], None), (*reply_of(model, page), end)) for page in pages])
    return model


@pytest.mark.parametrize(
    "family",
    [
        "llava-onevision",
        *(
            pytest.param(own, marks=pytest.mark.full)
            for own in ("llava", "llava-next", "qwen3-vl", "smolvlm", "gemma3", "paligemma2")
        ),
    ],
)
@pytest.mark.repeats_shapes
def test_heads_of_a_folder_are_scored_and_masked(family: str, tmp_path: Path) -> None:
    taught(family, tmp_path / "random").save_pretrained(tmp_path / "model")
    common = {**SMALL, "model": str(tmp_path / "model"), "data_folder": tmp_path / "data"}
    scored = run(ScoreConfig(**common, out=tmp_path / "scores"))
    assert "100.0% answered correctly" in scored.summary
    run(MaskConfig(**common, out=tmp_path / "masks", task_samples=2, random_draws=2))
    answers: Any = pd.read_parquet(tmp_path / "masks" / "tables" / "masking-answers.parquet")
    assert set(answers["task"]) == {"page", "text", "naming"} and answers["reply"].notna().all()


@pytest.mark.parametrize("family", ["gemma3", "paligemma2"])
def test_the_sink_is_said_to_be_the_pictures_where_prompts_begin_with_it(family: str, tmp_path: Path) -> None:
    model = HookedVLM.from_pretrained(save_whole(family, tmp_path), device="cpu")
    inputs = to_inputs(model, toy_pages(0, 1, False), None)
    pictured = inputs.visuals[0].holds(inputs.first[0])
    assert pictured == ("picture" in first_token(model)) == (family == "paligemma2")


@pytest.mark.parametrize("family", (*STITCHED, "smolvlm"))
def test_a_place_that_is_seen_twice_has_tokens_in_both_parts(family: str, tmp_path: Path) -> None:
    """By hand: the tokens whose box shares more than a tenth of the character's; never one of a line break."""
    model = HookedVLM.from_pretrained(save_whole(family, tmp_path), device="cpu")
    both = 0
    for page in toy_pages(0, 3, False):
        reply = reply_of(model, page)
        inputs = to_inputs(model, [page], None).append([reply])
        layout, visual = inputs.image_grid(0), inputs.visuals[0]
        copies = find_copies(model, inputs, 0, page, reply, protocol=Protocol())
        assert len(copies) == len(page.answer)
        for copy, evidence in zip(copies, page.evidence, strict=True):
            expected = {p for p in visual.positions.tolist() if shared(inputs.box_of_token(p), evidence.box) > 0.1}
            assert set(copy.evidence) == expected
            parts = {layout.part_of(visual.positions.tolist().index(p)) for p in copy.evidence}
            assert parts <= {"tiles", "thumbnail"}
            both += len(parts) == 2
    assert both


def shared(token: Any, box: Any) -> float:
    """Share of a box that lies in a token's; none of it in a line break's."""
    if token is None:
        return 0.0
    across = min(token[2], box[2]) - max(token[0], box[0])
    down = min(token[3], box[3]) - max(token[1], box[1])
    return max(across, 0) * max(down, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


def test_what_was_cropped_away_has_no_token_and_is_not_copied(tmp_path: Path) -> None:
    """LLaVA-1.5 sees the middle square; a box outside of the picture is still refused."""
    model = HookedVLM.from_pretrained(save_whole("llava", tmp_path), device="cpu")
    boxes = [(0, 10, 10, 20), (60, 10, 70, 20)]
    evidence = tuple(Evidence(i, i + 1, 0, box) for i, box in enumerate(boxes))
    page = Example("What is it?", ("hi",), (Image.new("RGB", (120, 40)),), evidence)
    reply = reply_of(model, page)
    inputs = to_inputs(model, [page], None).append([reply])
    cut, seen = find_copies(model, inputs, 0, page, reply, protocol=Protocol())
    assert cut.evidence == () and cut.position is not None
    assert seen.evidence and all(shared(inputs.box_of_token(p), boxes[1]) > 0.1 for p in seen.evidence)
    outside = Example("What is it?", ("hi",), page.images, (Evidence(0, 1, 0, (200, 0, 210, 10)),))
    with pytest.raises(GeometryError, match="outside the image"):
        find_copies(model, inputs, 0, outside, reply, protocol=Protocol())


def test_a_head_that_looks_at_a_line_break_has_no_box_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = taught("llava-next", tmp_path / "model", 1)
    config = ScoreConfig(**{**SMALL, "samples": 1}, out=tmp_path / "out")
    study = Study(config, model)
    visual = to_inputs(model, study.scored(as_text=False)[0].examples[:1], None).visuals[0]
    breaks = [p for p in visual.positions.tolist() if visual.layout.box_of(p - visual.start) is None]
    assert breaks
    drawn: list[Any] = []

    def at_breaks(model: Any, inputs: Any, positions: Any, layers: Any) -> torch.Tensor:
        rows = torch.zeros(1, 1, model.cfg.n_heads, positions.shape[1], inputs.shape[1])
        rows[..., breaks[0]] = 1
        rows[..., 0, breaks[0]], rows[..., 0, visual.start] = 0, 1
        return rows

    monkeypatch.setattr(head_scores, "attention_rows", at_breaks)
    monkeypatch.setattr(head_scores.plots, "sample_pages", lambda pages, boxes, titles: drawn.extend(boxes) or Figure())
    looks(study)
    (boxes,) = drawn
    (box,) = boxes
    assert box == pytest.approx(visual.layout.box_of(0))
