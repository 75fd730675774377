"""Data sets: every format gives the same samples, parts make up the whole, pictures are opened late."""

import csv
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_vlm import HookedVLM, InputError
from hooked_vlm.data import NamedBox, Sample, Samples, read_samples
from hooked_vlm.data.sources import Source

ROWS = [
    {"id": "a", "prompt": "What?", "images": ["0.png"], "answer": "red"},
    {"id": "b", "prompt": 'Which, and "where"?', "images": ["1.png", "0.png"]},
    {"id": "c", "prompt": "No picture", "answer": "none"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number, colour in enumerate(["red", "blue"]):
        Image.new("RGB", (56, 28 * (number + 1)), colour).save(folder / f"{number}.png")
    (folder / "rows.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)) + "\n", encoding="utf-8")
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["id", "prompt", "images", "answer"])
        table.writeheader()
        table.writerows([{**row, "images": json.dumps(row["images"])} if "images" in row else row for row in ROWS])
    return folder


def told(samples: Any) -> list[tuple]:
    return [(s.id, s.prompt, [Path(p).name for p in s.images], s.answer) for s in samples]


def test_json_lines_and_csv_hold_the_same_samples(folder: Path) -> None:
    lines, table = read_samples(folder / "rows.jsonl"), read_samples(folder / "rows.csv")
    assert told(lines) == told(table) == [(r["id"], r["prompt"], r.get("images", []), r.get("answer")) for r in ROWS]
    assert [s.digest() for s in lines] == [s.digest() for s in table]
    assert len(lines) == len(table) == 3
    assert told(lines) == told(lines), "samples can be read again"
    assert told(pickle.loads(pickle.dumps(table))) == told(table)


def test_blank_lines_are_no_rows_and_byte_order_marks_no_text(folder: Path) -> None:
    (folder / "blank.csv").write_text("\ufeffid,prompt\na,What?\n\nb,Which?\n\n", encoding="utf-8")
    found = read_samples(folder / "blank.csv")
    assert len(found) == len(list(found)) == 2 and [s.id for i in (0, 1) for s in found.shard(i, 2)] == ["a", "b"]
    (folder / "empty.csv").write_text("", encoding="utf-8")
    assert len(read_samples(folder / "empty.csv")) == 0
    (folder / "mark.jsonl").write_text("\ufeff" + json.dumps(ROWS[2]), encoding="utf-8")
    assert told(read_samples(folder / "mark.jsonl")) == [("c", "No picture", [], "none")]


def test_one_picture_may_be_named_alone_and_a_question_is_a_prompt(folder: Path) -> None:
    (folder / "questions.csv").write_text("question,image,question_id\nWhat?,0.png,7\n", encoding="utf-8")
    assert told(read_samples(folder / "questions.csv")) == [("7", "What?", ["0.png"], None)]


def test_a_folder_of_pictures(folder: Path) -> None:
    assert told(read_samples(folder, "Describe.")) == [(f"{n}.png", "Describe.", [f"{n}.png"], None) for n in (0, 1)]
    with pytest.raises(InputError, match="--prompt"):
        read_samples(folder)


class Numbers(Source):
    """Samples that are called by their numbers."""

    def __len__(self) -> int:
        return 40

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        return (Sample(str(number), "?") for number in range(start, stop))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 50))
def test_the_parts_in_their_order_are_the_whole(n: int, parts: int, limit: int) -> None:
    samples = Samples(Numbers(), 0, n).first(limit)
    shards = [samples.shard(i, parts) for i in range(parts)]
    assert [sample.id for shard in shards for sample in shard] == [str(i) for i in range(min(n, limit))]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    for i in (-1, parts):
        with pytest.raises(InputError, match="counted from 0"):
            samples.shard(i, parts)


def test_a_data_set_of_hugging_face(folder: Path, tmp_path: Path) -> None:
    import datasets

    toy = HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")

    pictures = [str(folder / f"{n}.png") for n in (0, 1)]
    columns = {"question": ["What?", "Where?"], "image": pictures, "question_id": [5, 6], "answers": [["red", "x"], []]}
    made = datasets.Dataset.from_dict(columns | {"unrelated": [1, 2]}).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "rows.parquet")
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(tmp_path / "splits")
    expected = [("5", "What?", "red"), ("6", "Where?", None)]
    for path in ("saved", "rows.parquet"):
        samples = read_samples(tmp_path / path)
        assert [(s.id, s.prompt, s.answer) for s in samples] == expected
        assert [(s.id, s.prompt, s.answer) for s in pickle.loads(pickle.dumps(samples))] == expected
        first = next(iter(samples))
        assert isinstance(first.images[0], dict), "the picture is not decoded yet"
        sizes: Any = first.inputs(toy).image_sizes
        assert [(size.width, size.height) for size in sizes] == [(56, 28)]
        assert first.digest() != next(iter(samples.shard(1, 2))).digest()
    assert len(read_samples(tmp_path / "splits", split="test")) == 1
    with pytest.raises(InputError, match="train, test"):
        len(read_samples(tmp_path / "splits"))
    with pytest.raises(InputError, match="neither splits nor subsets"):
        read_samples(folder / "rows.csv", split="test")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": 3}', r"line 2.*no prompt"),
        ("x.jsonl", '{"prompt": "a", "anwser": "b"}', "'anwser'"),
        ("x.jsonl", '{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "a"}', "line 2.*taken"),
        ("x.jsonl", "[1]", "JSON object"),
        ("x.jsonl", '{"prompt": "a", "images": [3]}', "paths"),
        ("x.jsonl", '{"prompt": "a", "answer": 3}', "no text"),
        ("x.csv", "prompt,answer\na,b,c\n", "row 1.*more cells"),
        ("x.csv", 'prompt,images\na,"[3"\n', "row 1"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, name: str, text: str, match: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"(?s){match}"):
        list(read_samples(tmp_path / name))


def test_there_is_no_such_data_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file or folder"):
        read_samples(tmp_path / "nothing.jsonl")


def test_boxes_are_read(tmp_path: Path) -> None:
    row = {"prompt": "a", "boxes": [{"name": "key", "box": [0, 1, 2, 3], "image": 1}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (sample,) = read_samples(tmp_path / "x.jsonl")
    assert sample.boxes == (NamedBox("key", (0.0, 1.0, 2.0, 3.0), 1),) and sample.id == "0"
