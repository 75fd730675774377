"""Tables of a report: equal decimals, sort keys, thumbnails, and files that hold the same."""

import base64
import gzip
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_vlm.experiments.common.tables import MISSING, PLAIN, Table, decimals


def shown(table: Table, name: str) -> list[str]:
    return [cell.shown for column in table.columns if column.name == name for cell in column.cells]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, np.nan], ["1", "2", MISSING]),
        ([1200, 3], ["1,200", "3"]),
        ([0.1, 0.25], ["0.10", "0.25"]),
        ([0.123456, 1.0], ["0.123", "1.000"]),
        ([-0.00001, 0.5123], ["0.000", "0.512"]),
        ([-0.5123, 0.1], ["−0.512", "0.100"]),
        ([12.3456, 0.5], ["12.3", "0.5"]),
        ([1234.567, 2.5], ["1,235", "2"]),
        ([0.00012345, 0.00001], ["0.000123", "0.000010"]),
        ([np.nan, np.nan], [MISSING, MISSING]),
    ],
)
def test_numbers_of_a_column_have_equal_decimals(values: list[float], expected: list[str]) -> None:
    assert shown(Table("t", pd.DataFrame({"x": values}), ""), "x") == expected


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_shown_numbers_lie_within_half_of_the_last_decimal(values: list[float]) -> None:
    frame = pd.DataFrame({"x": values}, dtype=float)
    places = decimals(frame["x"].to_numpy())
    texts = shown(Table("t", frame, ""), "x")
    assert len({text.partition(".")[2].__len__() for text in texts}) == 1
    read = np.array([float(text.replace(",", "").replace("−", "-")) for text in texts])
    assert np.abs(read - values).max() <= 0.5 * 10.0**-places * (1 + 1e-6)


def test_p_values_have_three_decimals_and_small_ones_are_bounds() -> None:
    table = Table("t", pd.DataFrame({"p": [0.00049, 0.0005, 0.04, 1.0, np.nan], "p (Holm)": [0.0, 1, 1, 1, 1]}), "")
    assert shown(table, "p") == ["<0.001", "0.001", "0.040", "1.000", MISSING]
    assert shown(table, "p (Holm)")[0] == "<0.001"


def test_an_interval_has_the_decimals_of_its_value() -> None:
    frame = pd.DataFrame({"score": [0.998, 0.98], "low": [0.99, 0.9], "high": [1.0, 1.0], "n": [200, 200]})
    table = Table("t", frame, "")
    assert [shown(table, name)[0] for name in frame] == ["0.998", "0.990", "1.000", "200"]


def test_only_numbers_are_numbers_and_keys_keep_every_digit() -> None:
    frame = pd.DataFrame(
        {"a": [0.1 + 0.2, 1 / 3], "b": [True, False], "c": ["x", None], "d": pd.Series([1, None], dtype=object)}
    )
    a, b, c, d = Table("t", frame, "").columns
    assert [column.kind for column in (a, b, c, d)] == ["number", "text", "text", "number"]
    assert [float(cell.key) for cell in a.cells] == [0.1 + 0.2, 1 / 3]
    assert [cell.shown for cell in b.cells] == ["yes", "no"]
    assert c.cells[1].shown == MISSING and c.cells[1].key == ""
    assert [cell.shown for cell in d.cells] == ["1", MISSING]


def test_pictures_are_thumbnails_and_stay_out_of_files(tmp_path: Path) -> None:
    pixels = np.zeros((40, 300, 3), dtype=np.uint8)
    pixels[..., 0] = 200
    frame = pd.DataFrame({"name": ["a", "b", "c"]})
    frame["picture"] = pd.Series([Image.fromarray(pixels), pixels / 255, None], dtype=object)
    table = Table("t", frame, "")
    column = table.columns[1]
    assert column.kind == "picture" and column.cells[2].shown == ""
    first, second = (
        Image.open(BytesIO(base64.b64decode(cell.shown.partition("base64,")[2]))) for cell in column.cells[:2]
    )
    assert first.size == second.size == (96, 13)
    assert first.getpixel((5, 5)) == second.getpixel((5, 5)) == (200, 0, 0)
    parquet, csv = table.write(tmp_path)
    assert list(pd.read_parquet(parquet)) == list(pd.read_csv(csv)) == ["name"]


@given(st.lists(st.tuples(st.floats(allow_infinity=False), st.integers(0, 2**40), st.booleans()), min_size=1))
def test_csv_equals_parquet(rows: list[tuple[float, int, bool]]) -> None:
    frame = pd.DataFrame(rows, columns=["x", "n", "ok"]).assign(name='a "quoted", name\nof two lines')
    table = Table("t", frame, "")
    parquet = BytesIO()
    table.data.to_parquet(parquet, index=False)
    pd.testing.assert_frame_equal(
        pd.read_csv(BytesIO(table.csv), float_precision="round_trip"), pd.read_parquet(parquet), check_exact=True
    )


def test_a_page_holds_all_rows_compressed_where_they_are_many_and_not_where_they_are_too_many() -> None:
    rng = np.random.default_rng(0)
    for n, name in ((10, "t.csv"), (10_000, "t.csv.gz")):
        table = Table("t", pd.DataFrame({"x": rng.integers(9, size=n)}), "", limit=0)
        if n == 10_000:
            table = Table("t", pd.DataFrame({"x": rng.integers(10**9, size=n)}), "", limit=0)
        assert table.download is not None
        assert table.download[0] == name
        content = base64.b64decode(table.download[1].partition("base64,")[2])
        assert (len(table.csv) > PLAIN) == name.endswith("gz")
        assert (gzip.decompress(content) if name.endswith("gz") else content) == table.csv
    assert Table("t", pd.DataFrame({"x": rng.random(150_000)}), "", limit=0).download is None


@pytest.mark.parametrize(("rows", "limit", "raw"), [(100, 0, True), (100, 8, True), (100, 20, False), (8, 8, False)])
def test_tables_that_show_few_of_their_rows_are_raw(rows: int, limit: int, raw: bool) -> None:
    table = Table("t", pd.DataFrame({"x": range(rows)}), "", limit)
    assert table.is_raw == raw
    assert (f"{rows} rows" in table.more) == (limit < rows)
