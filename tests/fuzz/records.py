"""Cases made of what studies keep and read back: parts, data sets, annotations, tables."""

import hashlib
import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fuzz.draws import Draws, changed_bytes, changed_json, json_bytes
from fuzz.laws import held
from fuzz.seeds import picture, seed_folder
from hooked_vlm.experiments.head_attribution import Compare, compare
from hooked_vlm.experiments.head_attribution.coco import coco_items
from hooked_vlm.experiments.ocr_heads.data.store import load_or_build
from hooked_vlm.experiments.ocr_heads.examples import Evidence, Example
from hooked_vlm.runtime.store import ResultStore


def records(data: bytes) -> str:
    """Parts, data sets, COCO annotations and the tables that runs are compared by, damaged or forged."""

    def case(folder: Path) -> str:
        draws = Draws(data)
        return draws.pick((damaged_part, damaged_data_set, damaged_coco, damaged_run))(draws, folder)

    return held(case)


FRAME = pd.DataFrame({"head": np.arange(200) % 7, "score": np.linspace(0, 1, 200), "name": ["a", "b"] * 100})


def damaged_part(draws: Draws, folder: Path) -> str:
    parts, key = ResultStore(folder / "parts"), {"image": 1, "seed": 0}
    parts.put(key, FRAME)
    path = parts.path(key)
    whole = path.read_bytes()
    path.write_bytes(changed_bytes(draws, whole))
    found = parts.get(key)
    if found is not None and not found.equals(FRAME):
        raise AssertionError("a damaged part was read as if it were whole")
    return "part made again" if found is None else "part read"


def damaged_data_set(draws: Draws, folder: Path) -> str:
    copied = shutil.copytree(data_set(), folder / "data")
    place = next(copied.iterdir())
    name = draws.pick(("manifest.json", "manifest.json", "examples.jsonl", "images/00000-0.png"))
    whole = (place / name).read_bytes()
    if name == "manifest.json" and not draws.one_in(3):
        content = json.loads(whole)
        outside = draws.pick(("/etc/passwd", "../../../../etc/passwd", "/dev/zero", "images", ".", "", "nowhere"))
        files = {outside: "0" * 64} if draws.one_in(2) else {}
        content["sha256"] = {**files, **content["sha256"]} if draws.one_in(2) else {**content["sha256"], **files}
        damaged = json_bytes(changed_json(draws, content))
    elif name == "examples.jsonl" and not draws.one_in(3):  # forged: its digest is that of what it holds
        lines = [json.loads(line) for line in whole.splitlines()]
        lines[0] = changed_json(draws, lines[0], lambda: draws.odd() if draws.one_in(2) else "../../../etc/passwd")
        damaged = b"\n".join(map(json_bytes, lines)) + b"\n"
        manifest = json.loads((place / "manifest.json").read_text())
        manifest["sha256"][name] = hashlib.sha256(damaged).hexdigest()
        (place / "manifest.json").write_text(json.dumps(manifest))
    else:
        damaged = changed_bytes(draws, whole)
    (place / name).write_bytes(damaged)
    data = load_or_build(copied, "tiny", {"seed": 0}, lambda: ([], ""))
    for example in data.examples:
        for image in example.images:
            if not str(image).startswith(str(place)):
                raise AssertionError(f"a data set names {image}, outside of its folder")
    return "data set read"


@lru_cache
def data_set() -> Path:
    folder = seed_folder() / "data sets"
    evidence = (Evidence(0, 2, 0, (1.0, 2.0, 3.0, 4.0)),)
    examples = [Example("q", ("a", "b"), (picture(),), evidence, "context", None) for _ in range(2)]
    load_or_build(folder, "tiny", {"seed": 0}, lambda: (examples, "made up"))
    return folder


COCO: dict[str, Any] = {
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "images": [{"id": 7, "width": 48, "height": 32, "file_name": "a.png"}, {"id": 8, "width": 48, "height": 32,
                                                                             "file_name": "b.png"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 1, "area": 400.0, "iscrowd": 0, "segmentation": [[1, 1, 9, 1, 9, 9]]},
        {"id": 2, "image_id": 8, "category_id": 2, "area": 500.0, "iscrowd": 0, "segmentation": [[1, 1, 9, 1, 9, 9]]},
    ],
}  # fmt: skip


def damaged_coco(draws: Draws, folder: Path) -> str:
    for name in ("a.png", "b.png"):
        picture().save(folder / name)
    path = folder / "instances.json"
    path.write_bytes(json_bytes(changed_json(draws, COCO)))
    if draws.one_in(8):
        path.write_bytes(changed_bytes(draws, path.read_bytes()))
    coco_items(path, folder, "What?", 5, 0, 0.1, 0.8)
    return "coco read"


def damaged_run(draws: Draws, folder: Path) -> str:
    tables = folder / "run" / "tables"
    tables.mkdir(parents=True)
    record = {"config": {"model": "toy"}, "model": "toy", "weights": "0", "images": [1, 2]}
    summary = pd.DataFrame({"measure": ["x"], "value": [0.5], "low": [0.1], "high": [0.9], "n": [3]})
    layers = pd.DataFrame({"layer": [0, 1], "share": [0.5, 0.5], "low": [0.1, 0.1], "high": [0.9, 0.9]})
    frames = {"summary": summary, "layers": layers}
    which = draws.pick(("run.json", *frames))
    if which != "run.json":
        frame = frames[which]
        column = draws.pick(list(frame.columns))
        action = draws.below(4)
        if action == 0:
            frames[which] = frame.drop(columns=column)
        elif action == 1:
            frames[which] = frame.assign(
                **{column: draws.pick(("x", None, float("nan"), 10**9, [[1]] * len(frame), True))}
            )
        elif action == 2:
            frames[which] = frame.head(0)
    for name, frame in frames.items():
        file = tables / f"{name}.parquet"
        frame.to_parquet(file, index=False)
        if name == which and draws.one_in(2):
            file.write_bytes(changed_bytes(draws, file.read_bytes()))
    content = changed_json(draws, record) if which == "run.json" else record
    (folder / "run" / "run.json").write_bytes(json_bytes(content))
    compare(Compare((folder / "run",), folder / "out"))
    return "run compared"
