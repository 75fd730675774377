"""Drawn objects, COCO and folders of pictures, and the answers that are studied."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import bundled
from PIL import Image
from probes import probe_of, toy_case, value_under
from scipy import ndimage

from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.head_attribution import Attribute
from hooked_vlm.experiments.head_attribution.ablation import make_probes, metric_of
from hooked_vlm.experiments.head_attribution.coco import object_mask
from hooked_vlm.experiments.head_attribution.items import Item
from hooked_vlm.experiments.head_attribution.masks import random_masks
from hooked_vlm.experiments.head_attribution.tasks import ask, folder_items, is_right, items_of, right_cases, toy_items
from hooked_vlm.interventions import ReplaceImageKV, mean_image_kv
from hooked_vlm.runtime.store import ResultStore
from hooked_vlm.runtime.tasks import InProcess
from hooked_vlm.toys.drawings import OBJECTS
from hooked_vlm.toys.pages import NAMING_PROMPT


@pytest.mark.parametrize(
    ("reply", "name", "expected"),
    [("Dog", "dog", True), (" dog.", "dog", True), ("Dining  table!", "dining table", True), ("hot dog", "dog", False)],
)
def test_a_reply_is_the_name(reply: str, name: str, expected: bool) -> None:
    assert is_right(reply, name) == expected


def test_drawn_objects_come_equally_often_and_lie_where_they_are_said_to() -> None:
    items = toy_items(20, 3, NAMING_PROMPT)
    assert [item.name for item in items] == [*OBJECTS, *OBJECTS] and len({item.id for item in items}) == 20
    again = toy_items(20, 3, NAMING_PROMPT)
    assert [item.id for item in items] == [item.id for item in again]
    for item in items[:10]:
        mask, pixels = item.object_mask, np.asarray(item.image).astype(float)
        assert mask is not None and mask.shape == pixels.shape[:2]
        jumps = np.abs(np.diff(pixels, axis=1)).max(2) > 40
        near = ndimage.binary_dilation(jumps, iterations=3)  # an outline is up to five pixels wide
        outline = mask[:, 1:] ^ mask[:, :-1]
        assert near[outline].all() and near[~outline].mean() < 0.4


def coco_folder(folder: Path) -> tuple[Path, Path]:
    """Four pictures: a fair single object, two objects, a crowd, one too small."""
    shapes = {1: [(10, 10, 60, 60)], 2: [(0, 0, 50, 50), (50, 50, 99, 79)], 3: [(10, 10, 60, 60)], 4: [(0, 0, 5, 5)]}
    annotations, images = [], []
    for image, boxes in shapes.items():
        Image.new("RGB", (100, 80), "white").save(folder / f"{image}.png")
        images.append({"id": image, "file_name": f"{image}.png", "width": 100, "height": 80})
        for x0, y0, x1, y1 in boxes:
            outline = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            area = (x1 - x0) * (y1 - y0)
            own = {"image_id": image, "category_id": 7, "area": area, "iscrowd": int(image == 3)}
            annotations.append(own | {"segmentation": outline})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "dog"}]}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json", folder


def test_coco_pictures_have_one_object_of_a_fair_size(tmp_path: Path) -> None:
    annotations, images = coco_folder(tmp_path)
    config = Attribute(annotations=annotations, images=images)
    assert config.source == "coco"
    (item,) = items_of(config)
    assert item.name == "dog" and "one word" in item.question
    assert item.object_mask is not None and item.object_mask.shape == (80, 100)
    assert item.object_mask[10:60, 10:60].all() and abs(item.object_mask.sum() - 2500) < 120
    with pytest.raises(StudyError, match=r"90%.*100%"):
        items_of(replace(config, min_object=0.9, max_object=1.0))
    Image.new("RGB", (80, 100)).save(tmp_path / "1.png")
    with pytest.raises(StudyError, match=r"80 x 100.*100 x 80"):
        items_of(config)
    content = json.loads(annotations.read_text())
    for missing in ("categories", "images", "annotations"):
        annotations.write_text(json.dumps({name: part for name, part in content.items() if name != missing}))
        with pytest.raises(StudyError, match=f"COCO.*{missing}"):
            items_of(config)
    annotations.write_text(json.dumps(content | {"categories": []}))
    with pytest.raises(StudyError, match="COCO"):
        items_of(config)


@pytest.mark.parametrize("outline", [None, [], {"counts": "x", "size": [80, 100]}])
def test_coco_objects_without_polygons_have_no_mask(outline: Any, tmp_path: Path) -> None:
    annotations, images = coco_folder(tmp_path)
    content = json.loads(annotations.read_text())
    for own in content["annotations"]:
        own["segmentation"] = outline
    annotations.write_text(json.dumps(content))
    (item,) = items_of(Attribute(annotations=annotations, images=images))
    assert item.name == "dog" and item.object_mask is None


def test_masks_of_several_polygons() -> None:
    mask = object_mask([[0, 0, 3, 0, 3, 3, 0, 3], [6, 6, 9, 6, 9, 9, 6, 9]], (12, 10))
    assert mask.shape == (10, 12) and mask[1, 1] and mask[8, 8] and not mask[5, 5]


def test_a_folder_of_pictures_is_named_by_its_folders(tmp_path: Path) -> None:
    for name in ("dog", "dining_table"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 10)).save(tmp_path / name / "a.png")
        (tmp_path / name / "notes.txt").write_text("no picture")
    items = folder_items(tmp_path, "What?", 5, 0)
    assert {item.name for item in items} == {"dog", "dining table"}
    with pytest.raises(StudyError, match="--images"):
        folder_items(tmp_path / "dog", "What?", 5, 0)
    Image.new("RGB", (20, 10)).save(tmp_path / "dog" / "again.png")
    assert sorted(item.name for item in items_of(Attribute(images=tmp_path))) == ["dining table", "dog"]


def test_only_right_answers_are_studied(toy: str, tmp_path: Path) -> None:
    model = bundled(toy)
    items = toy_items(3, 0, NAMING_PROMPT)
    items[1] = Item(items[1].image, "elephant", NAMING_PROMPT)
    answers = ask(InProcess(model), items, ResultStore(tmp_path), {}, quiet=True, what="asking")
    cases = right_cases(model, items, answers)
    assert answers["right"].tolist() == [True, False, True]
    assert [case.item.name for case in cases] == ["circle", "triangle"]
    assert [case.target for case in cases] == [model.to_single_token(name) for name in ("circle", "triangle")]
    assert cases[0].foil == cases[1].target  # the only other name
    with pytest.raises(StudyError, match=r"1.*'square'.*'elephant'"):
        right_cases(model, items[1:2], answers[1:2].reset_index())


def test_targets_and_baselines(toy: str) -> None:
    model, case = bundled(toy), probe_of(toy).case
    config = Attribute()
    logits = torch.randn(1, model.cfg.d_vocab)
    right, wrong = logits[0, case.target], logits[0, case.foil]
    assert metric_of(case, "difference")(logits)[0] == pytest.approx(float(right - wrong), abs=1e-5)
    log_prob = float(logits.log_softmax(-1)[0, case.target])
    assert metric_of(case, "log_prob")(logits)[0] == pytest.approx(log_prob, abs=1e-5)
    with pytest.raises(StudyError, match="--target"):
        metric_of(replace(case, foil=None), "difference")
    other = toy_case(toy, 1)
    kept = random_masks(3, len(probe_of(toy).heads), 0.5, [0])
    values = {}
    for baseline in ("mean", "dataset", "zero", "knockout"):
        for rope in ("before", "after"):
            probe, _ = make_probes(model, [case, other], replace(config, baseline=baseline, rope=rope))
            found = probe.over_heads(kept)
            lost = [head for head, keep in zip(probe.heads, kept[0], strict=True) if not keep]
            pair = [case.inputs, other.inputs]
            real = mean_image_kv(model, pair, rope == "before") if baseline == "dataset" else baseline
            expected = ReplaceImageKV(tuple(lost), real, rope == "before").hooks(model, case.inputs)
            assert found[0] == pytest.approx(value_under(probe, expected), abs=1e-4)
            if rope == "before" or baseline in ("mean", "dataset"):  # the others have no keys to rotate
                values[baseline, rope] = found
    for (first, a), (second, b) in combinations(values.items(), 2):
        assert np.abs(a - b).max() > 1e-3, (first, second)
