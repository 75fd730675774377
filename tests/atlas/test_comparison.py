"""Two atlases, head by head."""

import numpy as np
import pandas as pd
import pytest
from made_up_atlas import made_up_atlas
from scipy import stats

from hooked_vlm.analysis.multiple_testing import holm
from hooked_vlm.analysis.text_tables import in_width
from hooked_vlm.atlas.comparison import COLUMNS, compare
from hooked_vlm.atlas.result import Atlas, Observed
from hooked_vlm.atlas.show import ALPHA
from hooked_vlm.errors import InputError

SHAPE = (3, 4)


def shifted(name: str, layer: int, head: int, by: float, spread: float = 0.01) -> Atlas:
    """The atlas, but for small changes of every head without a direction, and one head of one score with one."""
    rng = np.random.default_rng(5)

    def edit(own: str, values: np.ndarray) -> None:
        noise = spread * rng.standard_normal(values.shape)
        values += noise - noise.mean(0)
        if own == name:
            values[:, layer, head] += by

    return made_up_atlas("after", SHAPE, (2, 3), edit=edit)


def one_score(values: np.ndarray, stimuli: tuple[str, ...], model: str = "made up", **settings: object) -> Atlas:
    return Atlas(model, {"ocr": Observed(stimuli, values, np.zeros_like(values))}, settings)


def test_a_difference_is_that_of_the_stimuli_both_have() -> None:
    """By hand: three stimuli in common, in another order, of four; one head lacks a value on one of them."""
    a = one_score(np.array([[[1.0, 2.0]], [[2.0, 2.0]], [[4.0, np.nan]], [[9.0, 9.0]]]), ("p", "q", "r", "s"))
    b = one_score(np.array([[[100.0, 0.0]], [[7.0, 5.0]], [[3.0, 6.0]], [[4.0, 4.0]]]), ("t", "r", "p", "q"))
    first, second = compare(a, b).table.to_dict("records")
    assert (first["layer"], first["head"], first["n"], second["n"]) == (0, 0, 3, 2)
    assert first["a"] == pytest.approx(7 / 3) and first["b"] == pytest.approx(14 / 3)
    assert first["difference"] == pytest.approx(7 / 3)  # 2, 2, 3
    assert second["a"] == 2.0 and second["b"] == 5.0 and second["difference"] == 3.0
    assert np.isnan(second["p"]) and np.isnan(second["low"])  # two stimuli are no test


def test_p_and_interval_are_those_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.random((8, 2, 3)), rng.random((8, 2, 3)) + 0.4
    names = tuple(f"s{i}" for i in range(8))
    table = compare(one_score(before, names), one_score(after, names)).table
    assert tuple(table.columns) == COLUMNS
    expected = [stats.ttest_rel(after[:, i, j], before[:, i, j]) for i in range(2) for j in range(3)]
    np.testing.assert_allclose(table["p"], [max(test.pvalue, 2.0**-7) for test in expected])
    np.testing.assert_allclose(table["p_holm"], holm(table["p"].to_numpy()))
    np.testing.assert_allclose(table["low"], [test.confidence_interval().low for test in expected])
    np.testing.assert_allclose(table["high"], [test.confidence_interval().high for test in expected])


def test_a_head_without_values_leaves_the_tests_of_others_alone() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.random((8, 2, 3)), rng.random((8, 2, 3))
    after[:, 0, 1] = np.nan
    after[:3, 1, 2] = np.nan
    names = tuple(f"s{i}" for i in range(8))
    for table in (
        compare(one_score(before, names), one_score(after, names)).table,
        Atlas("m", {"ocr": Observed(names, after, before)}).table,
    ):
        p = table["p"].to_numpy().reshape(2, 3)
        assert np.isnan(p[0, 1]) and np.isfinite(p).sum() == 5 and table["n"].tolist() == [8, 0, 8, 8, 8, 5]
        for i, j in ((0, 0), (1, 2)):
            use = np.isfinite(after[:, i, j])
            of_t = stats.ttest_rel(after[use, i, j], before[use, i, j])[1]
            assert p[i, j] == pytest.approx(max(of_t, 2.0 ** (1 - use.sum())))


@pytest.mark.parametrize(("name", "by"), [("ocr", 0.3), ("transfer", -0.2)])
def test_a_planted_change_is_found_with_its_sign_and_no_other(name: str, by: float) -> None:
    before = made_up_atlas("before", SHAPE, (2, 3))
    found = compare(before, shifted(name, 1, 2, by))
    hit = pd.DataFrame(found.table[found.table["p_holm"] <= ALPHA])
    (row,) = hit.to_dict("records")
    assert (row["score"], row["layer"], row["head"]) == (name, 1, 2)
    assert row["difference"] == pytest.approx(by, abs=1e-6) and row["low"] <= by <= row["high"]
    changed = np.zeros(SHAPE, bool)
    changed[1, 2] = True
    np.testing.assert_array_equal(found.changed("language"), changed)
    assert not found.changed("vision").any()
    counts = found.scores.set_index("score").loc[name]
    assert (counts["up"], counts["down"], counts["head"]) == (int(by > 0), int(by < 0), "1.2")
    backwards = compare(shifted(name, 1, 2, by), before).table
    np.testing.assert_allclose(backwards["difference"], -found.table["difference"])


def test_equal_atlases_have_no_changes() -> None:
    found = compare(made_up_atlas("one", SHAPE, None), made_up_atlas("two", SHAPE, None))
    assert set(found.table["difference"]) == {0.0} and set(found.table["p"]) == {1.0}
    assert not found.changed("language").any()
    assert found.text.splitlines()[3].startswith("0 of 12 heads of the language model changed in at least one score")
    with pytest.raises(InputError, match="vision tower is not compared"):
        found.changed("vision")


def test_the_headline_is_corrected_for_all_scores_too() -> None:
    """A head of ten that stands by one score of three (p between 0.05 / 30 and 0.05 / 10) is no change of the whole."""
    names = tuple(f"s{i}" for i in range(18))
    noise = np.repeat(np.array([1.0, -1, 2, -2, 1, -1] * 3)[:, None, None], 10, 2)
    shift = np.zeros(10)
    shift[4] = 1.187
    before = {name: Observed(names, 0 * noise, 0 * noise) for name in ("ocr", "induction", "locality")}
    after = before | {name: Observed(names, noise, 0 * noise) for name in before}
    after["ocr"] = Observed(names, noise + shift, 0 * noise)
    found = compare(Atlas("a", before), Atlas("b", after))
    p = float(np.asarray(stats.ttest_1samp((noise + shift)[:, 0, 4], 0))[1])
    assert 10 * p < ALPHA < 30 * p
    assert found.scores["up"].tolist() == [1, 0, 0] and not found.changed("language").any()
    alone = compare(Atlas("a", {"ocr": before["ocr"]}), Atlas("b", {"ocr": after["ocr"]}))
    assert np.argwhere(alone.changed("language")).tolist() == [[0, 4]]


def test_a_head_on_two_stimuli_is_untested_and_counted() -> None:
    names = ("p", "q", "r", "s")
    values = np.random.default_rng(0).random((4, 1, 2)).round(2)
    moved = values + 0.5
    moved[2:, 0, 1] = np.nan
    found = compare(one_score(values, names), one_score(moved, names))
    assert found.table["p"].tolist()[0] == 2.0**-3  # the same difference on all: what flipping its signs allows
    assert np.isnan(found.table["p"][1]) and found.scores["untested"].tolist() == [1]
    assert "untested" in found.text


def test_towers_of_other_shapes_are_refused_and_the_other_tower_is_compared() -> None:
    a, b = made_up_atlas("a/model", (3, 4), (2, 3)), made_up_atlas("b/model", (4, 4), (2, 3))
    found = compare(a, b)
    assert set(found.table["tower"]) == {"vision"}
    (sentence,) = found.refused.values()
    assert sentence == "Heads of the language model do not correspond: 3 layers of 4 in a/model, 4 of 4 in b/model."
    assert sentence in " ".join(found.text.split()) and found.data["refused"] == {"language": sentence}
    with pytest.raises(InputError, match="do not correspond"):
        compare(made_up_atlas("a", (3, 4), None), made_up_atlas("b", (4, 4), None))


def test_what_cannot_be_paired_is_refused() -> None:
    values = np.zeros((3, 1, 1))
    here, elsewhere = one_score(values, ("p", "q", "r")), one_score(values, ("s", "t", "u"))
    with pytest.raises(InputError, match="no stimulus in common, so nothing"):
        compare(here, elsewhere)
    drawn = [one_score(values, ("p", "q", "r"), digests={"p": "1", "q": f"{seed}", "r": f"{seed}"}) for seed in (2, 3)]
    assert compare(*drawn).table["n"].tolist() == [1]  # the other two are other pictures of the same name
    other = Atlas("other", {"induction": here.observed["ocr"]})
    with pytest.raises(InputError, match="OCR: not in the atlas of other"):
        compare(here, other)


def test_the_text_answers_first_and_fits_the_terminal() -> None:
    found = compare(made_up_atlas("before", SHAPE, (2, 3)), shifted("ocr", 1, 2, 0.3))
    text = in_width(found.text)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "1 of 12 heads of the language model changed in at least one score" in " ".join(text.split())
    assert any(line.split()[:2] == ["1.2", "ocr"] for line in text.splitlines())
    assert found.data["towers"]["language"] == {"changed": ["1.2"], "heads": 12}
    assert found.data["scores"]["ocr"]["up"] == 1 and found.data["scores"]["induction"]["largest"] is None
