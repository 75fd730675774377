"""Units of work in this process: each done once, kept, and given back in order; sweeps made of them."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import model_and_inputs

from hooked_vlm import InputError, SweepCase, sweep, sweep_many
from hooked_vlm.interventions import AddVector, CustomHooks, ReplaceImageKV, ZeroHeads
from hooked_vlm.metrics import logit, logit_difference
from hooked_vlm.runtime.store import ResultStore
from hooked_vlm.runtime.tasks import InProcess, SharedSetup, Task

HEADS = tuple((layer, head) for layer in range(3) for head in range(4))


class Model:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[int] = []


def square(model: Model, number: int) -> pd.DataFrame:
    model.asked.append(number)
    assert not torch.is_grad_enabled()
    if number < 0:
        raise KeyboardInterrupt
    return pd.DataFrame({"square": [number**2]})


def units(folder: Path, *numbers: int) -> list[Task]:
    return [Task(ResultStore(folder), {"number": number}, square, (number,), size=10) for number in numbers]


def squares(tables: Any) -> list[int]:
    return [int(table["square"][0]) for table in tables]


def test_units_are_done_once_and_given_back_in_order(tmp_path: Path) -> None:
    model: Any = Model()
    with InProcess(model) as workers:
        assert squares(workers.tables(units(tmp_path, 3, 1, 3, 2), "squares", quiet=True)) == [9, 1, 9, 4]
        assert model.asked == [3, 1, 2]  # the one that came twice is one
        assert squares(workers.tables(units(tmp_path, 2, 5), "squares", quiet=True)) == [4, 25]
        assert model.asked == [3, 1, 2, 5] and workers.size == 40 and workers.seconds > 0
        assert len(list(tmp_path.iterdir())) == 4


def test_what_was_done_before_an_interrupt_is_kept(tmp_path: Path) -> None:
    model: Any = Model()
    with pytest.raises(KeyboardInterrupt):
        InProcess(model).tables(units(tmp_path, 1, 2, -1, 3), "squares", quiet=True)
    assert model.asked == [1, 2, -1]
    assert squares(InProcess(model).tables(units(tmp_path, 1, 2, 3), "squares", quiet=True)) == [1, 4, 9]
    assert model.asked == [1, 2, -1, 3]


def test_the_bar_counts_units_and_what_they_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = Model()
    InProcess(model).tables(units(tmp_path, 1, 2), "squares", each="number", counted="tokens")
    shown = capsys.readouterr().err
    assert "squares" in shown and "2/2" in shown and "tokens/s" in shown


def read(model: Model, text: str) -> str:
    model.asked.append(-len(text))
    return text


def repeated(model: Model, text: str, n: int) -> pd.DataFrame:
    return pd.DataFrame({"text": [text * n]})


def test_what_units_begin_with_is_made_once_for_those_that_follow_each_other(tmp_path: Path) -> None:
    model: Any = Model()
    parts = ResultStore(tmp_path)
    texts = [SharedSetup(read, (text,)) for text in ("a", "bb")]
    units = [Task(parts, {"n": n, "text": i}, repeated, (n,), setup=texts[i]) for i in (0, 1) for n in (1, 2)]
    found: Any = InProcess(model).tables(units, "texts", quiet=True)
    assert [table["text"][0] for table in found] == ["a", "aa", "bb", "bbbb"]
    assert model.asked == [-1, -2]
    again: Any = InProcess(model).tables(
        [*units, Task(parts, {"n": 3}, repeated, (3,), setup=texts[1])], "x", quiet=True
    )
    assert again[-1]["text"][0] == "bbbbbb" and model.asked == [-1, -2, -2]  # of the others nothing is needed


# ---------------------------------------------------------------- sweeps over many images


def cases_of(family: str) -> tuple[Any, list[Any]]:
    """Cases of one image and of three rows, with interventions that differ in their tensors only."""
    cases = []
    generator = torch.Generator().manual_seed(3)
    for rows in ("one image", "padded"):
        model, batch = model_and_inputs(family, rows)
        vectors = [torch.randn(model.cfg.d_model, generator=generator) for _ in range(3)]
        steered = [AddVector("blocks.1.hook_resid_post", vector) for vector in vectors]
        runs = [ReplaceImageKV((HEADS[3],)), *steered, *(ZeroHeads((head,)) for head in HEADS)]
        cases.append(SweepCase(rows, batch, runs, logit_difference(5, 9)))
    return model, cases


@pytest.mark.parametrize("family", ["qwen2-vl", "internvl2"])
@pytest.mark.repeats_shapes
def test_many_sweeps_are_sweeps_one_after_the_other(family: str, tmp_path: Path) -> None:
    model, cases = cases_of(family)
    found: Any = sweep_many(model, cases, tmp_path, runs_per_block=5)
    assert len(list(tmp_path.glob("*.parquet"))) == 8
    each = [sweep(model, c.inputs, c.interventions, c.metric).to_dataframe().assign(case=c.name) for c in cases]
    expected: Any = pd.concat(each, ignore_index=True)[list(found.columns)]
    assert list(found.columns) == ["case", "run", "intervention", "row", "value", "baseline", "effect"]
    pd.testing.assert_frame_equal(found, expected, check_exact=False, atol=2e-5, rtol=1e-5)
    labels = ["case", "run", "intervention", "row"]
    pd.testing.assert_frame_equal(found[labels], expected[labels])
    assert found.groupby(["case", "run"])["effect"].first().nunique() > 20  # or equal rows would prove nothing
    whole = sweep_many(model, (case for case in cases), tmp_path / "whole")  # any iterable of cases
    pd.testing.assert_frame_equal(whole, expected)  # one block is one sweep, bit for bit


def test_only_blocks_that_changed_are_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cases = cases_of("qwen2-vl")
    case = cases[0]
    done: list[int] = []

    def counted(model: Any, inputs: Any, interventions: Any, *rest: Any, **settings: Any) -> Any:
        done.append(len(interventions))
        return sweep(model, inputs, interventions, *rest, **settings)

    monkeypatch.setattr(import_module("hooked_vlm.sweeps.many"), "sweep", counted)

    def run(**changes: Any) -> Any:
        done.clear()
        return sweep_many(model, [SweepCase(**(vars(case) | changes))], tmp_path, runs_per_block=8)

    first = run()
    assert done == [8, 8]
    pd.testing.assert_frame_equal(run(name="another name").drop(columns="case"), first.drop(columns="case"))
    assert done == []
    run(metric=logit(5))
    assert done == [8, 8]
    other = AddVector("blocks.1.hook_resid_post", torch.ones(model.cfg.d_model))
    changed = run(interventions=[case.interventions[0], other, *case.interventions[2:]])
    assert done == [8]
    assert (changed["intervention"] == first["intervention"]).all()  # by their names nobody could tell
    assert [i for i in range(16) if changed["value"][i] != first["value"][i]] == [1]
    next(tmp_path.glob("*.parquet")).unlink()
    run()
    run(metric=logit(5))
    run(interventions=[case.interventions[0], other, *case.interventions[2:]])
    assert len(list(tmp_path.glob("*.parquet"))) == 5 and not list(tmp_path.glob(".*"))


def test_what_many_sweeps_cannot_do_is_said(tmp_path: Path) -> None:
    model, (case, _) = cases_of("qwen2-vl")
    with pytest.raises(InputError, match="'one image'"):
        sweep_many(model, [case, case], tmp_path)
    with pytest.raises(InputError, match="runs_per_block"):
        sweep_many(model, [case], tmp_path, runs_per_block=0)
    hooks = CustomHooks([("hook_embed", print)])
    refused: list[dict[str, Any]] = [{"metric": lambda logits: logits[:, 5]}, {"interventions": [hooks]}]
    for changes in refused:
        with pytest.raises(InputError, match="dataclass"):
            sweep_many(model, [SweepCase(**(vars(case) | changes))], tmp_path)
    assert not list(tmp_path.iterdir())
    empty = sweep_many(model, [], tmp_path)
    assert list(empty.columns) == ["case", "run", "intervention", "row", "value", "baseline", "effect"]
    assert not np.any(empty.to_numpy())
