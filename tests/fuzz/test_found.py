"""What the campaigns found, case by case: each is refused in one sentence of ours."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from PIL import Image

from fuzz.checkpoint_files import TEMPLATES, linked
from fuzz.draws import json_bytes
from fuzz.records import COCO, data_set
from fuzz.seeds import checkpoints, models, picture
from hooked_vlm import CheckpointError, HookedVLM
from hooked_vlm.errors import HookError, ImageError, InputError, StudyError
from hooked_vlm.experiments.head_attribution.coco import coco_items
from hooked_vlm.experiments.ocr_heads.data.store import load_or_build
from hooked_vlm.inputs.image_processor import ImageProcessor
from hooked_vlm.inputs.images import load_image
from hooked_vlm.inputs.tiles import TileProcessor
from hooked_vlm.interventions import AddVector, Compose, PatchActivation, ReplaceImageKV, ZeroHeads

QWEN, INTERNVL = "toy-qwen2-vl", "internvl qwen2"

SETTINGS: list[tuple[str, str, dict[str, Any]]] = [
    (QWEN, "generation_config.json", {"eos_token_id": "bfloat16"}),
    (QWEN, "generation_config.json", {"eos_token_id": {"x": 1}}),
    (QWEN, "generation_config.json", {"eos_token_id": [[1]]}),
    (QWEN, "generation_config.json", {"pad_token_id": "../../outside"}),
    (QWEN, "preprocessor_config.json", {"patch_size": "8"}),
    (QWEN, "preprocessor_config.json", {"min_pixels": []}),
    (QWEN, "preprocessor_config.json", {"min_pixels": [1], "size": {"min_pixels": [1]}}),
    (QWEN, "preprocessor_config.json", {"min_pixels": None, "size": {"shortest_edge": [1], "min_pixels": [1]}}),
    (QWEN, "preprocessor_config.json", {"min_pixels": 10**12, "max_pixels": 10**13}),
    (QWEN, "preprocessor_config.json", {"image_mean": [10**400, 0, 0]}),
    (QWEN, "preprocessor_config.json", {"image_std": [1e-308, 0.5, 0.5]}),
    (QWEN, "preprocessor_config.json", {"image_processor": []}),
    (QWEN, "preprocessor_config.json", {"do_resize": 5}),
    (INTERNVL, "preprocessor_config.json", {"max_patches": 10**9}),
    (INTERNVL, "preprocessor_config.json", {"min_patches": [1]}),
    (INTERNVL, "preprocessor_config.json", {"size": {"height": 2**20, "width": 2**20}}),
    (INTERNVL, "config.json", {"force_image_size": 2**28}),
    (INTERNVL, "config.json", {"max_dynamic_patch": 2**31 - 1}),
    (INTERNVL, "config.json", {"llm_config": {"num_hidden_layers": 10**9}}),
]


@pytest.mark.parametrize(("source", "file", "changes"), SETTINGS, ids=[f"{f} {c}"[:60] for _, f, c in SETTINGS])
def test_settings(source: str, file: str, changes: dict[str, Any], tmp_path: Path) -> None:
    path = checkpoints()[source] / file
    content = json.loads(path.read_text()) if path.exists() else {}
    for name, value in changes.items():
        content[name] = {**content[name], **value} if isinstance(content.get(name), dict) and value else value
    linked(checkpoints()[source], tmp_path, {file: json_bytes(content)})
    with pytest.raises(CheckpointError) as refused:
        HookedVLM.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def test_bounds_on_what_an_image_becomes() -> None:
    for processor in (
        lambda: ImageProcessor(min_pixels=2**25, max_pixels=2**26),
        lambda: ImageProcessor(patch_size=8192, max_pixels=2**40),
        lambda: TileProcessor(max_tiles=257),
        lambda: TileProcessor(448 * 16, max_tiles=12),
    ):
        with pytest.raises(ImageError):
            processor()
    assert ImageProcessor().max_pixels < 2**24 and TileProcessor(max_tiles=40).max_tiles == 40  # as published


def test_postscript_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "page.png", "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("it was run"))
    with Image.open(tmp_path / "page.png") as opened:
        for image in (tmp_path / "page.png", opened):
            with pytest.raises(ImageError, match="PostScript"):
                load_image(image)


@pytest.fixture
def with_template(monkeypatch: pytest.MonkeyPatch) -> Any:
    model = models()[QWEN]

    def ask(template: str) -> Any:
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
        return model.chat_text("What?")

    return ask


HARMLESS = ("{{ messages[0]", "{{ 'x' * 10**3", "{{ messages | tojson", "{{ strftime_now", "\0", "{{ [] | first")


@pytest.mark.parametrize("template", [t for t in TEMPLATES if not t.startswith(HARMLESS)])
def test_a_template_that_attacks_is_stopped(template: str, with_template: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chat template"):
        with_template(template)


def test_a_template_that_is_right_is_left_alone(with_template: Any) -> None:
    assert with_template("{% for m in messages %}{{ m['role'] }}{% endfor %}") == "user"


PROMPTS: list[Any] = [
    [5],
    [[5]],
    [{"content": "a"}],
    [{"role": ["user"], "content": "a"}],
    [{"role": "user", 3: 4}],
    {},
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
@pytest.mark.parametrize("name", [QWEN, "toy-internvl2"])
def test_messages(prompt: Any, name: str) -> None:
    with pytest.raises((InputError, TypeCheckError)):
        models()[name].to_inputs(prompt)


def test_batches_whose_tensors_have_other_shapes() -> None:
    model = models()[QWEN]
    made = model.to_inputs("a", images=[picture()])
    batch = {"input_ids": made.tokens, "pixel_values": made.pixel_values, "image_grid_thw": made.image_grid_thw}
    model.inputs_from_hf(batch)
    for name, value in (
        ("input_ids", None), ("input_ids", 0.5), ("input_ids", made.tokens[None]), ("pixel_values", 0.5),
        ("pixel_values", None), ("image_grid_thw", made.image_grid_thw.float()), ("image_grid_thw", [1, 4, 6]),
        ("image_grid_thw", [[1, 1, 1]]), ("image_grid_thw", [[-1, -4, 6]]), ("image_grid_thw", [[2**31, 2**31, 2]]),
    ):  # fmt: skip
        with pytest.raises((InputError, TypeCheckError)):
            model.inputs_from_hf({**batch, name: value})


HEADS: list[Any] = [5, None, (0,), ((0, 1, 2),), ((0.5, 1),), (("0", "1"),), ((None, 0),), "0.1"]


@pytest.mark.parametrize("heads", HEADS, ids=repr)
def test_heads_that_are_none(heads: Any) -> None:
    model = models()[QWEN]
    inputs = model.to_inputs("a", images=[picture()])
    with pytest.raises((InputError, TypeCheckError)):
        Compose((ZeroHeads(heads), ReplaceImageKV(heads))).hooks(model, inputs)


def test_truth_values_are_no_heads_and_no_positions() -> None:
    """As an index they would be a mask: heads 0 to 3 given as four of them chose others without a word."""
    model = models()[QWEN]
    inputs = model.to_inputs("a", images=[picture()])
    for made in (
        lambda: ZeroHeads(tuple((0, h > 1) for h in range(4))),
        lambda: ZeroHeads(((0, 0),), (True,) * inputs.shape[1]),
        lambda: AddVector("hook_embed", torch.zeros(model.cfg.d_model), 1.0, (True, False)),
    ):
        with pytest.raises((InputError, TypeCheckError)):
            made().hooks(model, inputs)


def test_hooks_that_are_none() -> None:
    model = models()[QWEN]
    inputs = model.to_inputs("a", images=[picture()])
    with pytest.raises((HookError, TypeCheckError)):
        model.run_with_cache(inputs, names_filter=["hook_embed", 5])
    with pytest.raises(InputError, match="pos_slice"):
        model.run_with_cache(inputs, names_filter="hook_embed", pos_slice=2**31)
    with pytest.raises(InputError, match=r"\(0,\)"):
        PatchActivation("blocks.0.hook_resid_pre", torch.zeros(0)).hooks(model, inputs)
    patches = PatchActivation("vision.blocks.0.hook_resid_pre", torch.zeros(1, 4, 96), (99,))
    with pytest.raises(InputError, match=r"99|\(1, 4, 96\)"):
        model.run_with_hooks(inputs, fwd_hooks=patches.hooks(model, inputs))


COCO_CHANGES: list[tuple[tuple[Any, ...], Any]] = [
    (("images", 0, "width"), 0), (("images",), 5), (("annotations", 0), []), (("images", 0, "file_name"), 5),
    (("annotations", 0, "segmentation"), [[1, 1, 20]]), (("annotations", 0, "segmentation"), [["x", "y"] * 3]),
    (("annotations", 0, "segmentation"), [5]), (("images", 0, "id"), [1]), (("annotations", 0, "area"), None),
    (("categories", 0), None),
]  # fmt: skip


@pytest.mark.parametrize(("at", "value"), COCO_CHANGES)
def test_annotations(at: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture().save(tmp_path / name)
    content = json.loads(json.dumps(COCO))
    assert len(_coco(tmp_path, content)) == 2
    place = content
    for key in at[:-1]:
        place = place[key]
    place[at[-1]] = value
    with pytest.raises(StudyError):
        _coco(tmp_path, content)


def _coco(folder: Path, content: Any) -> list:
    (folder / "instances.json").write_text(json.dumps(content))
    return coco_items(folder / "instances.json", folder, "What?", 5, 0, 0.1, 0.8)


@pytest.mark.parametrize("name", ["/dev/zero", "../../../../etc/passwd", "nowhere"])
def test_a_data_set_reads_its_own_files_only(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = next(Path(shutil.copytree(data_set(), tmp_path / "data")).iterdir())
    whole = json.loads((place / "manifest.json").read_text())
    load = lambda: load_or_build(tmp_path / "data", "tiny", {"seed": 0}, lambda: ([], ""))  # noqa: E731
    assert len(load().examples) == 2
    changed = [{**whole, "sha256": {name: "0" * 64, **whole["sha256"]}}, {**whole, "sha256": []}]
    changed += [{k: v for k, v in whole.items() if k != "source"}]
    changed += [{**whole, "sha256": {k: v for k, v in whole["sha256"].items() if k != "examples.jsonl"}}]
    for manifest in changed:
        (place / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(StudyError, match="damaged"):
            load()


def test_weights_that_are_whole_are_still_taken() -> None:
    """None of the refusals above is for a checkpoint as published."""
    for folder in checkpoints().values():
        assert all(p.isfinite().all() for p in HookedVLM.from_pretrained(folder).parameters())
