"""The head-attribution study from end to end: its laws, its files, its refusals."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from families import ONE_TOY, bundled

from hooked_vlm import cli
from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.head_attribution import All, Attribute, Compare, Curves, Tokens, compare, run
from hooked_vlm.experiments.head_attribution import measurements as measure_module
from hooked_vlm.experiments.head_attribution.masks import random_masks
from hooked_vlm.experiments.head_attribution.pages import heads_page, tokens_page
from hooked_vlm.experiments.head_attribution.study import summary
from hooked_vlm.experiments.head_attribution.text_flow import blocked_edges
from hooked_vlm.runtime.tasks import InProcess
from hooked_vlm.viewer.quantisation import decoded
from tools.toy_training.families import FAMILIES

SMALL: dict[str, Any] = {
    "samples": 2,
    "masks": 24,
    "token_masks": 40,
    "bootstrap": 5,
    "random_rankings": 1,
    "quiet": True,
}


def files_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "progress.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", [Tokens, pytest.param(All, marks=pytest.mark.full)])
@pytest.mark.repeats_shapes
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = bundled("toy-qwen2-vl"), kind(out=tmp_path / "whole", **SMALL)
    run(config, model)
    calls = []

    def interrupted(*arguments: Any) -> pd.DataFrame:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return blocked_edges(*arguments)

    resumed = replace(config, out=tmp_path / "resumed")
    monkeypatch.setattr(measure_module, "blocked_edges", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(resumed, model)
    assert not (resumed.out / "report.html").exists()
    run(resumed, model)
    assert len(calls) == 3  # the one done before is not done again
    whole = files_of(config.out)
    assert {name.split("/")[0] for name in whole} == {"parts", "tables", "figures", "run.json", "report.html"}
    assert files_of(resumed.out) == whole


@pytest.mark.parametrize("name", ONE_TOY)
@pytest.mark.repeats_shapes
def test_attribution_foretells_and_needs_fewer_heads_than_other_rankings(name: str, tmp_path: Path) -> None:
    # as many masks as by default; more of them held out, since a correlation over 32 is itself uncertain by 0.05
    config = Curves(out=tmp_path, samples=8, held_out=0.25, bootstrap=20, random_rankings=1, quiet=True)
    result = run(config, bundled(name))
    found = result.findings
    assert found["answered correctly"].value >= 0.8
    assert found["held-out Pearson"].low >= 0.9
    needed = {
        key.split(", ", 1)[1]: value.value
        for key, value in found.items()
        if key.startswith("heads needed for 0.8 of both")
    }
    assert needed["head attribution"] < needed["single-head ablation"]
    assert needed["head attribution"] < needed["attention to the image"]
    assert needed["head attribution"] < needed["random"]
    table: Any = pd.read_parquet(tmp_path / "tables" / "summary.parquet").set_index("measure")
    assert table["value"]["held-out Pearson"] == found["held-out Pearson"].value


@pytest.mark.repeats_shapes
@pytest.mark.parametrize(
    "design",
    ["antithetic", pytest.param("balanced", marks=pytest.mark.full), pytest.param("paired", marks=pytest.mark.full)],
)
def test_masks_of_every_design_give_coefficients_of_the_same_heads(design: Any, tmp_path: Path) -> None:
    model, settings = bundled("toy-qwen2-vl"), {**SMALL, "masks": 200}
    runs = [Attribute(out=tmp_path / name, design=name, **settings) for name in ("random", design)]
    plain, own = (measure_module.measure(model, config, InProcess(model)) for config in runs)
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(plain.coefficients, own.coefficients, strict=True)]
    assert min(correlations) > 0.9
    held = own.heads[0].fit.n_held_out
    assert (own.heads[0].kept[-held:] == random_masks(held, 16, 0.5, [0, 20, 0])).all()


@pytest.mark.slow
def test_the_answer_names_heads_budgets_and_pictures_and_prints_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 pictures of ten names; steps count pictures."""
    config = All(out=tmp_path, **{**SMALL, "samples": 20, "masks": 60, "quiet": False})
    result = run(config, bundled("toy-qwen2-vl"))
    progress = capsys.readouterr().err
    assert "step 1 of 11" in progress and "step 11 of 11" in progress and "picture" in progress
    assert 3 <= len(result.answer) <= 5
    best = int(np.argmax(result.measured.coefficients.mean(0)))
    assert "{}.{} (".format(*result.measured.probes[0].heads[best]) in result.answer[0]
    assert "32 runs a picture" in " ".join(result.answer) and "of 10 names" in result.answer[-1]
    shown = summary(result)
    assert shown.startswith(result.answer[0]) and "nan" not in shown and "n=0" not in shown
    tables = {path.stem: pd.read_parquet(path) for path in (tmp_path / "tables").glob("*.parquet")}
    assert all(len(table) for table in tables.values())
    budgets = tables["curve_measures"].groupby("ranking")["runs per picture"].first().to_dict()
    assert budgets["head attribution"] == 60 and budgets["single head kept + ablated"] == 32
    assert budgets["head attribution, one run per head"] == budgets["single-head ablation"] == 16
    assert int(tables["curve_differences"]["equal budget"].to_numpy().sum()) == 9
    assert {"low, by picture", "low, by name", "pictures", "names"} <= set(tables["summary"].columns)
    assert {"p", "adjusted p", "pictures above 0"} <= set(tables["heads"].columns)


@pytest.mark.repeats_shapes
def test_a_picture_of_a_run_is_a_page(tmp_path: Path) -> None:
    model = bundled("toy-qwen2-vl")
    found = measure_module.measure(model, Attribute(out=tmp_path / "heads", **SMALL), InProcess(model))
    probe = found.probes[1]
    view = heads_page(found, 1)
    best = int(np.argmax(found.coefficients[1]))
    assert view.ranked[0] == probe.heads[best] and len(set(view.ranked)) == len(probe.heads)
    pattern = probe.model.run_with_cache(probe.case.inputs)[1]["pattern", 2][0, :, -1]
    shape = (len(view.layers), len(view.heads), len(probe.image))
    shown, _ = decoded(view.packed.rows[0], shape, view.packed.zero)
    assert shown[2] == pytest.approx(pattern[:, list(probe.image)].detach().numpy(), abs=0.003)
    mask = probe.case.item.object_mask
    ((x0, y0, x1, y1),) = view.scene.evidence[0]
    assert mask is not None
    inside = mask[int(y0) : int(y1), int(x0) : int(x1)]
    columns, rows = np.any(inside, axis=0), np.any(inside, axis=1)
    assert inside.sum() == mask.sum() and all((columns[0], columns[-1], rows[0], rows[-1]))
    with pytest.raises(StudyError, match=r"3.*heads.*2"):
        heads_page(found, 3)
    with pytest.raises(StudyError, match="image tokens"):
        tokens_page(found)
    found = measure_module.measure(model, Tokens(out=tmp_path / "tokens", **SMALL), InProcess(model))
    page = tokens_page(found, 1)
    shown, _ = decoded(page.packed.rows[0], (1, 1, len(probe.image)), page.packed.zero)
    coefficients = found.tokens[1].fit.coefficients
    assert shown[0, 0] == pytest.approx(coefficients, abs=0.01 * np.abs(coefficients).max())


def test_runs_are_compared_side_by_side(tmp_path: Path) -> None:
    for name in FAMILIES:
        run(Attribute(model=name, out=tmp_path / name, **SMALL), bundled(name))
    page = compare(Compare(tuple(tmp_path / name for name in FAMILIES), tmp_path / "both"))
    text = page.read_text(encoding="utf-8")
    assert all(name in text for name in FAMILIES) and "held-out Pearson" in text
    with pytest.raises(StudyError, match="finished"):
        compare(Compare((tmp_path / "both",), tmp_path / "again"))
    with pytest.raises(StudyError, match="--runs"):
        compare(Compare((), tmp_path / "again"))


def test_tokens_alone_need_no_masks_over_heads(tmp_path: Path) -> None:
    model = bundled("toy-internvl2")
    found = measure_module.measure(model, Tokens(out=tmp_path, **SMALL), InProcess(model))
    assert not (tmp_path / "parts" / "heads_masks").exists()
    assert len(found.tokens) == len(found.edges) == 2 and not found.heads


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 0}, "--samples"),
        ({"keep": 1.0}, "--keep"),
        ({"object_overlap": 2.0}, "--object-overlap"),
        ({"data": "folder"}, "--data folder.*--images"),
        ({"images": Path("/nowhere")}, "--images.*/nowhere"),
        ({"seed": -1}, "--seed"),
        ({"masks": 11}, r"--masks 11.*--held-out 0\.1.*9.*10"),
        ({"held_out": 0.99}, r"--masks 320.*--held-out 0\.99.*3"),
        ({"design": "antithetic", "keep": 0.4}, r"--design antithetic.*0\.4"),
        ({"design": "balanced", "keep": 0.33}, r"--design balanced.*0\.33"),
        ({"min_object": 0.9}, r"--min-object 0\.9.*--max-object 0\.8"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        replace(All(), **changes).check()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"top": 17}, "--top 17.*16"), ({"window": 5}, "--window 5.*4")],
)
def test_more_heads_or_layers_than_there_are_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=words):
        run(All(out=tmp_path, **SMALL, **changes), bundled("toy-qwen2-vl"))


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    mute = copy.copy(bundled("toy-qwen2-vl"))
    mute.tokenizer = None
    with pytest.raises(StudyError, match="tokenizer"):
        run(Attribute(out=tmp_path, quiet=True), mute)


@pytest.mark.repeats_shapes
def test_the_command_line_has_one_command_for_each_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["hooked-vlm", "head-attribution", *arguments])
        cli.main()

    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "quiet"]
    call("attribute", *small, "--quiet", "--out", str(tmp_path / "a"))
    assert "held-out Pearson" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        call("compare", "--runs", str(tmp_path), "--out", str(tmp_path / "c"))
    assert "finished" in str(stopped.value)
    with pytest.raises(SystemExit):
        call("--help")
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("all", "attribute", "curves", "where", "tokens", "compare"))
