"""What is streamed is what a run of each sample alone makes, row by row, and the index says what each row is."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import ONE_TOY
from streams import NAMES, samples, stream
from torch import Tensor

from hooked_vlm import GeometryError, HookedVLM, HookError, InputError
from hooked_vlm.activations import Activations, NamedBox, Sample, stream_activations
from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.nn.block import Block

N = 4
SQUARE = np.zeros((64, 64, 3), np.uint8)
FAMILIES = ["toy-qwen2-vl", "toy-internvl2"]
EVERYWHERE = [
    *("hook_embed", "blocks.*.hook_resid_post", "blocks.2.attn.hook_[qkz]", "ln_final.hook_out"),
    *("vision.hook_embed", "vision.blocks.1.attn.hook_z", "projector.*", "hook_image_features"),
]


@lru_cache
def model_of(family: str) -> HookedVLM:
    return HookedVLM.from_pretrained(family, device="cpu")


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> HookedVLM:
    return model_of(request.param)


def unpadded(name: str, tensor: Tensor, inputs: VLMInputs, class_token: bool) -> Tensor:
    """The rows of a cached activation of one sample, by a loop over its images (tiles)."""
    if name == "hook_image_features":
        return tensor
    if not name.startswith(("vision.", "projector.")):
        return tensor[0]
    rows = []
    pictures = [(h, w) for t, h, w in inputs.grids for _ in range(t)]
    for one, (h, w) in zip(tensor, pictures, strict=True):
        per_patch = tensor.shape[1] > max(a * b for a, b in pictures) // 4
        rows.append(one[: h * w + class_token] if per_patch else one[: h * w // 4])
    return torch.cat(rows)


def compare(model: HookedVLM, acts: Activations, check: Callable[[Tensor, Tensor], None]) -> int:
    tables = {kind: acts.table(kind, ["sample"]) for kind in ("tokens", "patches", "image_tokens")}
    assert model.cfg.vision is not None
    compared = 0
    for sample in samples(acts.n_samples):
        inputs = sample.inputs(model)
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs)
        for name in acts.names:
            mine = (tables[acts[name].kind]["sample"] == sample.id).to_numpy()
            if name not in cache:
                assert not sample.images and not mine.any()
                continue
            expected = unpadded(name, cache[name], inputs, model.cfg.vision.tile_size is not None)
            check(acts[name][mine], expected)
            compared += 1
    return compared


@pytest.mark.parametrize("model", ONE_TOY, indirect=True)
def test_samples_run_alone_give_the_bits_of_a_cached_run(model: HookedVLM, tmp_path: Path) -> None:
    acts = stream(model, tmp_path / "acts", names_filter=EVERYWHERE, tokens_per_batch=1)

    def same(found: Tensor, expected: Tensor) -> None:
        assert torch.equal(found, expected)

    assert compare(model, acts, same) > 50
    assert not any(name.endswith(("hook_pattern", "hook_attn_scores")) for name in acts.names)
    assert len(acts.shards) > 1


@pytest.mark.parametrize("model", ONE_TOY, indirect=True)
def test_batches_of_padded_rows_and_many_pictures_differ_by_rounding(model: HookedVLM, tmp_path: Path) -> None:
    acts = stream(model, tmp_path / "acts", names_filter=EVERYWHERE, tokens_per_batch=1400)
    compare(model, acts, lambda found, expected: torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4))


@pytest.mark.repeats_shapes
def test_the_index_says_what_the_inputs_say(model: HookedVLM, tmp_path: Path) -> None:
    index = stream(model, tmp_path / "acts").index
    seen: set[Any] = set()
    for sample in samples(N):
        inputs, own = sample.inputs(model), index[index["sample"] == sample.id]
        assert own["position"].tolist() == list(range(inputs.shape[1]))
        assert own["token_id"].tolist() == inputs.tokens[0].tolist()
        assert own["token"].tolist() == [model.to_string([i]) for i in inputs.tokens[0].tolist()]
        for group in ("image", "question", "assistant_header", "generated"):
            assert own["position"][own["group"] == group].tolist() == getattr(inputs.positions, group)[0].tolist()
        assert own["position"][own["final"]].tolist() == inputs.positions.final[0].tolist()
        boxes = [(box.name, inputs.tokens_in_box(box.image, box.box)) for box in sample.boxes]
        grids = [inputs.image_grid(image) for image in range(inputs.n_images)]
        row: Any
        for row in own.astype(object).itertuples():
            if row.group != "image":
                assert pd.isna(row.image) and pd.isna(row.x0) and not len(row.evidence)
                continue
            assert (row.x0, row.y0, row.x1, row.y1) == inputs.box_of_token(row.position)
            assert row.image == inputs.image_of_token(row.position)
            assert row.image_token == row.position - inputs.image_tokens(row.image)[0]
            grid = grids[row.image]
            if grid.n_tiles > 1:
                assert row.thumbnail == grid.is_thumbnail(row.image_token) and row.tile == grid.tile_of(row.image_token)
            held = [name for name, tokens in boxes if row.position in tokens]
            assert list(row.evidence) == list(dict.fromkeys(held))
            seen |= {row.thumbnail, *held}
    assert seen >= {"key", "value", False}
    assert (True in seen) == (model.cfg.vision is not None and model.cfg.vision.tile_size is not None)


def test_patches_lie_where_the_picture_has_them(model: HookedVLM, tmp_path: Path) -> None:
    """One white patch after the other: the embedding that changes is the one whose box was painted."""
    vision = model.cfg.vision
    assert vision is not None
    size, side = (128, 128), vision.patch_size
    black = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    drawn = []
    for x, y in [(0, 0), (3, 1), (8, 15), (15, 15), (2, 9)]:
        drawn.append(black.copy())
        drawn[-1][y * side : (y + 1) * side, x * side : (x + 1) * side] = 255
    asked = [Sample(str(i), "What is it?", [image]) for i, image in enumerate([black, *drawn])]
    acts = stream_activations(model, asked, "vision.hook_embed", tmp_path / "acts")
    table, values = acts["vision.hook_embed"].index, acts["vision.hook_embed"][:]
    of = {name: rows.index.to_numpy().copy() for name, rows in table.groupby("sample")}
    for number, (x, y) in enumerate([(0, 0), (3, 1), (8, 15), (15, 15), (2, 9)], start=1):
        changed = (values[of[str(number)]] - values[of["0"]]).abs().sum(1) > 1e-3
        row: Any
        (row,) = table.loc[of[str(number)][changed.numpy()]].itertuples()
        assert (row.x0, row.y0, row.x1, row.y1) == (x * side, y * side, (x + 1) * side, (y + 1) * side)


@pytest.mark.parametrize(
    ("tokens", "meant"),
    [
        ("final", lambda t: t["final"]),
        ("text", lambda t: t["group"] != "image"),
        (("question", "generated"), lambda t: t["group"].isin(["question", "generated"])),
        ("evidence", lambda t: t["evidence"].map(len) > 0),
        ((0, -1), lambda t: (t["position"] == 0) | (t["position"] == t.groupby("sample")["position"].transform("max"))),
    ],
)
@pytest.mark.repeats_shapes
def test_chosen_tokens_are_those_rows_of_all(tokens: Any, meant: Any, tmp_path: Path) -> None:
    model = model_of("toy-qwen2-vl")
    names = ["blocks.1.hook_resid_post", "hook_image_features"]
    whole = stream(model, tmp_path / "all", names_filter=names)
    some = stream(model, tmp_path / "some", names_filter=names, tokens=tokens)
    index: Any = whole.index
    mask = meant(index).to_numpy(dtype=bool)
    assert 0 < mask.sum() < len(mask)
    pd.testing.assert_frame_equal(some.index, index[mask].reset_index(drop=True))
    torch.testing.assert_close(some[names[0]][:], whole[names[0]][mask], rtol=1e-4, atol=1e-4)
    assert some[names[1]].shape == whole[names[1]].shape  # of images everything is kept


def test_only_what_is_needed_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("toy-qwen2-vl")
    ran: list[int] = []
    forward = Block.forward

    def watched(block: Block, resid: Tensor) -> Tensor:
        if block.split_inputs:  # of the language model
            ran.append(block.attn.layer)
        return forward(block, resid)

    monkeypatch.setattr(Block, "forward", watched)
    stream(model, tmp_path / "vision", names_filter=["vision.*", "hook_image_features", "hook_embed"], n=2)
    assert ran == []
    stream(model, tmp_path / "layer", names_filter="blocks.1.*", n=1)
    assert ran == [0, 1]
    stream(model, tmp_path / "none", names_filter="blocks.1.*", n=1, tokens="generated")
    assert ran == [0, 1]  # nothing to keep, nothing run


def test_samples_are_taken_one_by_one(tmp_path: Path) -> None:
    model, taken, most = model_of("toy-qwen2-vl"), [0], []

    def counted() -> Any:
        for sample in samples(N):
            taken[0] += 1
            yield sample

    tower = type(model.vision)
    encode = tower.forward

    def watched(self: Any, *arguments: Any) -> Tensor:
        most.append(taken[0])
        return encode(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower, "forward", watched)
        stream_activations(model, counted(), "blocks.0.hook_resid_post", tmp_path / "acts", tokens_per_batch=1)
    assert most[:3] == [2, 3, 4]  # when the first runs, the second is known


def test_another_dtype_is_the_rounded_one(tmp_path: Path) -> None:
    model = model_of("toy-internvl2")
    full = stream(model, tmp_path / "full")
    half = stream(model, tmp_path / "half", dtype=torch.bfloat16, shard_bytes=2**19)
    assert half[NAMES[-1]].dtype == torch.bfloat16
    for name in full.names:
        torch.testing.assert_close(half[name][:].float(), full[name][:].bfloat16().float(), rtol=1e-2, atol=1e-2)


def test_the_manifest_says_what_it_is_of(tmp_path: Path) -> None:
    model = model_of("toy-qwen2-vl")
    acts = stream(model, tmp_path / "acts", tokens="text", min_overlap=0.25)
    said = json.loads((tmp_path / "acts" / "activations.json").read_text())
    made = said["made"]
    assert (made["model"], made["dtype"], made["tokens"], made["min_overlap"]) == (
        "toy-qwen2-vl",
        "float32",
        ["text"],
        0.25,
    )
    assert made["names"]["blocks.1.attn.hook_z"] == {"rows": "tokens", "shape": [4, 48]}
    assert len(made["weights"]) == 16 and made["versions"]["hooked-vlm"]
    assert (said["finished"], said["samples"]) == (True, N)
    assert said["rows"] == {kind: len(acts.table(kind)) for kind in said["rows"]}


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"names_filter": "blocks.9.hook_resid_post"}, HookError, r"'blocks\.9\.hook_resid_post'"),
        ({"names_filter": "blocks.1.attn.hook_pattern"}, HookError, r"\[pos, pos\]"),
        ({"names_filter": "block.*"}, HookError, r"'block\.\*'"),
        ({"names_filter": []}, HookError, "no hook point"),
        ({"names_filter": "blocks.1.attn.hook_result"}, HookError, "set_use_attn_result"),
        ({"tokens": "answer"}, InputError, "'answer'"),
        ({"tokens_per_batch": 0}, InputError, "tokens_per_batch"),
        ({"min_overlap": 1.0}, InputError, "min_overlap"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        stream(model_of("toy-qwen2-vl"), tmp_path / "acts", **settings)


@pytest.mark.parametrize(
    ("sample", "error", "words"),
    [
        (Sample("a", "What?", ["nowhere.png"]), InputError, r"'a'.*nowhere\.png"),
        (Sample("a", "What?", (), [NamedBox("value", (0, 0, 1, 1))]), InputError, "0 image"),
        (
            Sample("a", "What?", [np.zeros((64, 64, 3), np.uint8)], [NamedBox("value", (90, 0, 99, 1))]),
            GeometryError,
            "'a'",
        ),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(
    sample: Sample, error: type[Exception], words: str, tmp_path: Path
) -> None:
    model = model_of("toy-qwen2-vl")
    asked = [*samples(3), sample]
    with pytest.raises(error, match=words):
        stream_activations(model, asked, NAMES, tmp_path / "acts", shard_bytes=2**19)
    assert 0 < Activations(tmp_path / "acts").n_samples <= 3  # what came before is kept


def test_a_hook_left_on_the_model_is_refused(tmp_path: Path) -> None:
    model = model_of("toy-qwen2-vl")
    model.add_hook("blocks.0.hook_resid_post", lambda x, hook: x * 0)
    try:
        with pytest.raises(InputError, match="reset_hooks"):
            stream(model, tmp_path / "acts")
    finally:
        model.reset_hooks()
