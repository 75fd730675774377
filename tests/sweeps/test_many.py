"""Sweeps over data sets: any iterable, taken one by one; samples, answers, broken pictures, names and versions."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import model_and_inputs

from hooked_vlm import HookedVLM, InputError, SweepCase, sweep, sweep_many
from hooked_vlm.data import Sample
from hooked_vlm.interventions import CustomHooks, ZeroHeads
from hooked_vlm.metrics import Named, answered, log_prob, logit, logit_difference
from hooked_vlm.sweeps import OfAnswer, sweep_each
from hooked_vlm.toys import make_page

RUNS = tuple(ZeroHeads(((layer, head),)) for layer in range(2) for head in range(2))


@pytest.fixture(scope="module")
def toy() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Questions about pages on disk, every second with an answer."""
    folder, rng, samples = tmp_path_factory.mktemp("pages"), np.random.default_rng(5), []
    for number in range(4):
        page = make_page(rng, n_lines=3)
        page.image.save(folder / f"{number}.png")
        answer = page.lines[1].value if number % 2 else None
        samples.append(Sample(str(number), page.question(1), (folder / f"{number}.png",), (), answer))
    return samples


def cases_of(samples: list[Sample], metric: Any = None) -> Iterator[SweepCase]:
    return (SweepCase(sample.id, sample, RUNS, metric or OfAnswer()) for sample in samples)


def test_cases_are_taken_one_by_one_and_dropped(tmp_path: Path) -> None:
    model, inputs = model_and_inputs("qwen2-vl", "one image")
    alive: list[weakref.ref] = []
    most = 0

    def cases() -> Iterator[SweepCase]:
        nonlocal most
        for number in range(6):
            pixels = inputs.pixel_values + 0.01 * number
            own = replace(inputs, pixel_values=pixels)
            alive.append(weakref.ref(pixels))
            yield SweepCase(str(number), own, RUNS, logit(5))
            del pixels, own
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))

    table = sweep_many(model, cases(), tmp_path)
    assert list(table["case"].unique()) == [str(n) for n in range(6)] and len(table) == 6 * len(RUNS)
    assert most <= 2, "the case that runs, and the one before it"


@pytest.mark.parametrize("kind", ["log-prob", "logit-diff", "answer"])
def test_samples_are_the_loop_over_their_inputs(kind: Any, toy: HookedVLM, pages: list[Sample], tmp_path: Path) -> None:
    found: Any = sweep_many(toy, cases_of(pages, OfAnswer(kind)), tmp_path, runs_per_block=3)
    rows = []
    for sample in pages:
        inputs = replace(sample, answer=None).inputs(toy)
        said: Any = toy.generate(inputs, 16, return_type="tokens")
        new = said[0, inputs.shape[1] :].tolist()
        tokens = new if sample.answer is None else toy.tokenizer.encode(sample.answer, add_special_tokens=False)
        logits = toy(inputs)[0, -1]
        logits[tokens[0]] = -torch.inf
        whole = inputs.append([tokens])
        metric, own = {
            "log-prob": (log_prob(tokens[0]), inputs),
            "logit-diff": (logit_difference(tokens[0], int(logits.argmax())), inputs),
            "answer": (answered(whole), whole),
        }[kind]
        at: Any = "all" if kind == "answer" else "last"
        rows.append(sweep(toy, own, RUNS, metric, logits_at=at).to_dataframe().assign(case=sample.id))
    expected: Any = pd.concat(rows, ignore_index=True)
    columns = ["case", "run", "intervention", "row", "value", "baseline", "effect"]
    pd.testing.assert_frame_equal(found[columns], expected[columns], check_exact=False, atol=2e-5, rtol=1e-5)
    assert list(found.columns) == [*columns, "answer"]
    answers = found.groupby("case")["answer"].first()
    assert answers["1"] == pages[1].answer
    greedy = toy.generate(replace(pages[0], answer=None).inputs(toy), 16, return_type="str")
    assert answers["0"] == greedy and "<" not in greedy
    assert (found["effect"].abs() > 0).any() or kind == "answer"


def test_broken_pictures_stop_or_are_skipped(toy: HookedVLM, pages: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(Path(pages[0].images[0]).read_bytes()[:100])
    broken = Sample("broken", "What?", (tmp_path / "broken.png",))
    missing = Sample("missing", "What?", (tmp_path / "missing.png",))
    several = [pages[0], broken, missing, pages[1]]
    with pytest.raises(InputError, match=r"broken\.png"):
        sweep_many(toy, cases_of(several), tmp_path / "stop")
    with pytest.warns(UserWarning, match=r"2 samples were skipped"):
        found = sweep_many(toy, cases_of(several), tmp_path / "skip", on_error="skip")
    clean = sweep_many(toy, cases_of([pages[0], pages[1]]), tmp_path / "clean")
    pd.testing.assert_frame_equal(found, clean)
    skipped = pd.read_csv(tmp_path / "skip" / "skipped.csv")
    assert sorted(skipped["sample"]) == ["broken", "missing"] and skipped["reason"].str.contains("png").all()
    assert not (tmp_path / "clean" / "skipped.csv").exists()
    (tmp_path / "missing.png").write_bytes(Path(pages[2].images[0]).read_bytes())
    with pytest.warns(UserWarning, match=r"1 sample was skipped, the first 'broken'"):
        again = sweep_many(toy, cases_of(several), tmp_path / "skip", on_error="skip")
    assert list(again["case"].unique()) == ["0", "missing", "1"], "a picture that was mended is taken"


def test_a_case_that_cannot_be_used_is_named_and_its_twins_are_skipped_with_it(toy: HookedVLM, tmp_path: Path) -> None:
    inputs, runs = toy.to_inputs("Say hello."), [ZeroHeads(((0, 0),), tower="vision")]
    cases = [SweepCase(name, inputs, runs, OfAnswer()) for name in ("one", "two")]
    with pytest.raises(InputError, match="'one': there is no image"):
        sweep_many(toy, cases, tmp_path)
    with pytest.warns(UserWarning, match="2 samples were skipped"):
        assert not len(sweep_many(toy, cases, tmp_path, on_error="skip"))


def test_each_table_is_read_when_its_turn_comes(toy: HookedVLM, pages: list[Sample], tmp_path: Path) -> None:
    tables = sweep_each(toy, cases_of(pages), tmp_path, runs_per_block=3)
    first: Any = next(tables)
    assert len(list(tmp_path.glob("*.parquet"))) == 2 * len(pages), "all are stored before the first is given"
    assert (first["case"] == "0").all() and first["run"].tolist() == list(range(len(RUNS)))
    assert [table["case"][0] for table in tables] == ["1", "2", "3"]


def test_a_name_and_a_version_stand_for_what_cannot_be_compared(tmp_path: Path) -> None:
    model, inputs = model_and_inputs("qwen2-vl", "one image")
    calls = []

    def scaled(factor: float) -> Any:
        def hook(x: Any, hook: Any) -> Any:
            calls.append(factor)
            return x * factor

        return hook

    def value(factor: float, version: Any, metric: Any = None) -> float:
        hooks = CustomHooks([("blocks.1.hook_resid_post", scaled(factor))], label="scaled", version=version)
        metric = metric or Named(lambda logits: logits[:, 5], "logit 5", version=1)
        calls.clear()
        table: Any = sweep_many(model, [SweepCase("a", inputs, [hooks], metric)], tmp_path)
        return float(table["value"][0])

    half = value(0.5, 1)
    assert calls and value(0.5, 1) == half and not calls, "results are kept under the name and the version"
    assert value(0.9, 2) != half and calls
    assert value(0.5, 1, Named(lambda logits: logits[:, 6], "logit 6", version=1)) != half
    with pytest.raises(InputError, match="version"):
        value(0.5, None)
    with pytest.raises(InputError, match="Named"):
        value(0.5, 1, lambda logits: logits[:, 5])


def test_an_answer_is_about_one_prompt(toy: HookedVLM, pages: list[Sample], tmp_path: Path) -> None:
    inputs = replace(pages[0], answer=None).inputs(toy)
    for wrong in (inputs.append("red"), type(inputs).concat([inputs, inputs])):
        with pytest.raises(InputError, match="one prompt"):
            sweep_many(toy, [SweepCase("a", wrong, RUNS, OfAnswer())], tmp_path)
    with pytest.raises(InputError, match="empty"):
        sweep_many(toy, [SweepCase("a", inputs, RUNS, OfAnswer(answer=""))], tmp_path)
    given = sweep_many(toy, [SweepCase("a", inputs, RUNS, OfAnswer(answer="red"))], tmp_path)
    token = toy.tokenizer.encode("red", add_special_tokens=False)[0]
    plain = sweep(toy, inputs, RUNS, log_prob(token)).to_dataframe()
    np.testing.assert_allclose(given["value"], plain["value"], rtol=1e-6)
