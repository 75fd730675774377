"""Results kept as they are made: whole or not at all, found by what decides them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hooked_vlm.errors import OutputError
from hooked_vlm.runtime.files import atomic_write, writable_folder
from hooked_vlm.runtime.store import ResultStore

FRAME = pd.DataFrame({"head": [0, 1], "score": [0.25, 0.5]})


def test_a_part_is_made_once_and_found_again(tmp_path: Path) -> None:
    parts, made = ResultStore(tmp_path / "parts"), []

    def make() -> pd.DataFrame:
        made.append(1)
        return FRAME

    for _ in range(2):
        pd.testing.assert_frame_equal(parts.get_or_make({"image": 3, "seed": 0}, make), FRAME)
    assert len(made) == 1
    assert parts.get({"seed": 0, "image": 3}) is not None  # the order of a key's fields means nothing
    assert parts.get({"image": 3, "seed": 1}) is None
    assert parts.missing([{"image": 3, "seed": 0}, {"image": 4, "seed": 0}]) == [{"image": 4, "seed": 0}]


@pytest.mark.parametrize(
    "values",
    [[0.5, None], [[1, 2], [3]], [[[0.5]], [[]]], ["a", None], [None, None], [True, False], [{"a": 1}, {"a": 2}],
     [np.float32(1), np.float32(2)], [np.arange(3), np.arange(2)], [[{"a": [1]}], []], pd.Categorical(["a", "b"]),
     pd.to_datetime(["2020-01-01", "2021-01-01"])],
)  # fmt: skip
def test_columns_of_every_kind_are_found_again(values: Any, tmp_path: Path) -> None:
    parts, frame = ResultStore(tmp_path), pd.DataFrame({"value": values})
    made = parts.get_or_make({"image": 3}, lambda: frame)
    assert len(made) == len(frame) and list(made.columns) == ["value"]


def test_a_bit_that_flips_anywhere_never_passes_for_a_number(tmp_path: Path) -> None:
    parts = ResultStore(tmp_path)
    parts.put({"image": 3}, FRAME)
    whole = parts.path({"image": 3}).read_bytes()
    for at in range(0, len(whole), 3):
        parts.path({"image": 3}).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        found = parts.get({"image": 3})
        assert found is None or found.equals(FRAME), f"byte {at}"


def test_what_changed_of_a_model_since_a_part_was_stored(tmp_path: Path) -> None:
    parts, model = ResultStore(tmp_path), {"weights": "a", "code": "b", "tokenizer": "c"}
    key = {"image": 3, "model": model}
    assert parts.changed(key) == []  # there is nothing yet
    parts.put(key, FRAME)
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    assert parts.changed({"image": 3, "model": {**model, "code": "d"}}) == ["code"]
    assert parts.changed({"image": 3, "model": {**model, "code": "d", "weights": "e"}}) == ["code", "weights"]
    assert parts.changed({"image": 4, "model": {**model, "code": "d"}}) == []  # another question, not an old answer
    assert parts.changed({"image": 3}) == []


def test_the_same_unit_is_the_same_bytes(tmp_path: Path) -> None:
    a, b = ResultStore(tmp_path / "a"), ResultStore(tmp_path / "b")
    for parts in (a, b):
        parts.put({"image": 3}, FRAME)
    assert a.path({"image": 3}).read_bytes() == b.path({"image": 3}).read_bytes()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet" * 100])
def test_a_damaged_part_is_made_again(content: bytes, tmp_path: Path) -> None:
    parts = ResultStore(tmp_path)
    parts.put({"image": 3}, FRAME)
    whole = parts.path({"image": 3}).read_bytes()
    parts.path({"image": 3}).write_bytes(content)
    assert parts.get({"image": 3}) is None
    parts.get_or_make({"image": 3}, lambda: FRAME)
    assert parts.path({"image": 3}).read_bytes() == whole
    parts.path({"image": 3}).write_bytes(whole[: len(whole) // 2])
    assert parts.get({"image": 3}) is None


def test_a_part_under_anothers_name_is_not_taken_for_it(tmp_path: Path) -> None:
    parts = ResultStore(tmp_path)
    parts.put({"image": 3}, FRAME)
    parts.path({"image": 3}).rename(parts.path({"image": 4}))
    assert parts.get({"image": 4}) is None


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def half(aside: Path) -> None:
        aside.write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        atomic_write(tmp_path / "file", half)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="/file"):
        writable_folder(tmp_path / "file")
    with pytest.raises(OutputError, match=r"\\x00"):
        writable_folder(tmp_path / "a\0b")
    assert list(writable_folder(tmp_path / "new" / "folder").iterdir()) == []
