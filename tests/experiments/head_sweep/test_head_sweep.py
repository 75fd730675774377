"""`hooked-vlm sweep` and `merge`: the rows are those of the Python loop, shards make up the whole, work resumes."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_vlm import HookedVLM, InputError, SweepCase, VLMInputs, sweep_many
from hooked_vlm.commands.config import MergeConfig
from hooked_vlm.commands.merge import answer as merged
from hooked_vlm.data import Sample, read_samples
from hooked_vlm.experiments.common.frames import each_row
from hooked_vlm.experiments.head_sweep import HeadSweepConfig, run
from hooked_vlm.experiments.head_sweep.changes import means_over
from hooked_vlm.experiments.head_sweep.results import Results, picture_of
from hooked_vlm.experiments.head_sweep.show import head_table, write_report
from hooked_vlm.experiments.head_sweep.study import in_order, merge
from hooked_vlm.interventions import MeanHeads, ReplaceImageKV, ScaleHeads, ZeroHeads, mean_head_outputs
from hooked_vlm.runtime.tasks import InProcess
from hooked_vlm.sweeps import OfAnswer
from hooked_vlm.toys import make_page

COLUMNS = ["case", "run", "intervention", "row", "value", "baseline", "effect", "answer"]


@pytest.fixture(scope="module")
def toy() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng, lines = tmp_path_factory.mktemp("pages"), np.random.default_rng(5), []
    for number in range(5):
        page = make_page(rng, n_lines=3)
        page.image.save(folder / f"{number}.png")
        row = {"id": f"page {number}", "prompt": page.question(1), "images": [f"{number}.png"]}
        lines.append(json.dumps(row | ({"answer": page.lines[1].value} if number % 2 else {})))
    (folder / "pages.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "pages.jsonl"


def config_of(pages: Path, out: Path, **settings: Any) -> HeadSweepConfig:
    return HeadSweepConfig(**({"data": pages, "out": out, "quiet": True, "heads": ("2", "0.1")} | settings))


@pytest.fixture(scope="module")
def prompts(toy: HookedVLM, pages: Path) -> list[VLMInputs]:
    return [replace(sample, answer=None).inputs(toy) for sample in read_samples(pages)]


HEADS = [(0, 1), *((2, head) for head in range(4))]


@pytest.mark.parametrize("kind", ["zero", "mean", "scale", "image-kv", "knockout", "vision"])
def test_the_rows_are_those_of_the_loop(
    kind: Any, toy: HookedVLM, pages: Path, prompts: list[VLMInputs], tmp_path: Path
) -> None:
    n = 3
    samples = list(read_samples(pages))[:n]
    tower: Any = "vision" if kind == "vision" else "language"
    heads = [(0, 1)] if tower == "vision" else HEADS
    means = mean_head_outputs(toy, prompts[:n]) if kind == "mean" else torch.empty(0)
    runs = {
        "zero": lambda head: ZeroHeads((head,)),
        "mean": lambda head: MeanHeads((head,), means),
        "scale": lambda head: ScaleHeads((head,), 0.3),
        "image-kv": lambda head: ReplaceImageKV((head,)),
        "knockout": lambda head: ReplaceImageKV((head,), "knockout"),
        "vision": lambda head: ZeroHeads((head,), tower="vision"),
    }[kind]
    settings = (
        {"intervention": "zero", "tower": "vision", "heads": ("0.1",)} if kind == "vision" else {"intervention": kind}
    )
    found = run(config_of(pages, tmp_path / "out", factor=0.3, limit=n, **settings), toy)
    cases = [SweepCase(sample.id, sample, [runs(head) for head in heads], OfAnswer()) for sample in samples]
    expected: Any = sweep_many(toy, cases, tmp_path / "loop")
    table: Any = pd.read_parquet(tmp_path / "out" / "sweep.parquet")
    pd.testing.assert_frame_equal(table[COLUMNS], expected[COLUMNS], check_dtype=False, atol=2e-5, rtol=1e-5)
    assert [*zip(table["layer"], table["head"], strict=True)][: len(heads)] == heads
    assert (table["effect"] != 0).any()
    rows = pd.read_csv(tmp_path / "out" / "sweep.csv", dtype={"answer": str})
    pd.testing.assert_frame_equal(rows, table, check_dtype=False, rtol=1e-6)
    told = {(row.layer, row.head): row.effect for row in each_row(found.shown.table)}
    loop = expected.groupby("run")["effect"].mean()
    np.testing.assert_allclose([told[head] for head in heads], loop, rtol=1e-4, atol=1e-6)
    assert found.shown.table["effect"].abs().is_monotonic_decreasing


def test_means_come_from_sums_over_parts(
    toy: HookedVLM, pages: Path, prompts: list[VLMInputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hooked_vlm.experiments.head_sweep.changes.SAMPLES_PER_TASK", 2)
    found = means_over(read_samples(pages), config_of(pages, tmp_path), toy, InProcess(toy))
    np.testing.assert_allclose(found, mean_head_outputs(toy, prompts), rtol=1e-5, atol=1e-6)
    assert len(list((tmp_path / "parts").glob("*.parquet"))) == 3


@pytest.mark.parametrize("kind", ["zero", pytest.param("mean", marks=pytest.mark.full)])
def test_shards_make_up_the_whole(kind: Any, toy: HookedVLM, pages: Path, tmp_path: Path) -> None:
    settings = {"intervention": kind, "limit": 4, "heads": ("2",)}
    whole = run(config_of(pages, tmp_path / "whole", **settings), toy)
    shards = [tmp_path / f"shard{i}" for i in range(3)]
    for i in (2, 0, 1):
        run(config_of(pages, shards[i], shard=f"{i}/3", **settings), toy)
    text, data = merged(MergeConfig((shards[1], shards[2], shards[0]), tmp_path / "merged"))
    for name in ("sweep.csv", "samples.csv"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    pd.testing.assert_frame_equal(
        head_table(whole.results, 0), pd.read_parquet(tmp_path / "merged/tables/heads.parquet")
    )
    assert data["samples"] == 4 and data["answer"] == whole.shown.answer and whole.shown.answer[0].split()[0] in text
    for folders, match in [
        (shards[:2], "2/3"),
        ((shards[0], shards[0], *shards[1:]), "twice"),
        ((shards[0], pages.parent), "neither"),
    ]:
        with pytest.raises(InputError, match=match):
            merged(MergeConfig(tuple(folders), tmp_path / "no"))
    run(config_of(pages, tmp_path / "other", shard="1/3", **settings | {"metric": "logit-diff"}), toy)
    with pytest.raises(InputError, match="--metric"):
        merged(MergeConfig((shards[0], tmp_path / "other", shards[2]), tmp_path / "no"))
    with pytest.raises(InputError, match="one of the folders"):
        merged(MergeConfig((shards[0],), shards[0]))


def test_broken_pictures_are_listed(toy: HookedVLM, pages: Path, tmp_path: Path) -> None:
    text = pages.read_text() + "\n" + json.dumps({"id": "broken", "prompt": "What?", "images": ["broken.png"]})
    (pages.parent / "broken.png").write_bytes(b"no picture")
    lines = pages.parent / "with a broken one.jsonl"
    lines.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"broken\.png"):
        run(config_of(lines, tmp_path / "stops"), toy)
    with pytest.warns(UserWarning, match="1 sample was skipped"):
        found = run(config_of(lines, tmp_path / "skips", on_error="skip", intervention="mean"), toy)
    assert found.n_skipped == 1 and any("skipped.csv" in sentence for sentence in found.shown.answer)
    assert list(pd.read_csv(tmp_path / "skips" / "skipped.csv")["sample"]) == ["broken"]
    clean = run(config_of(pages, tmp_path / "clean", intervention="mean"), toy)
    np.testing.assert_array_equal(found.results.effects, clean.results.effects)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"heads": ("9.1",)}, "layers 0 to"),
        ({"heads": ("x",)}, "--heads"),
        ({"shard": "3/3"}, "--shard"),
        ({"shard": "1"}, "--shard"),
        ({"limit": 0}, "--limit"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"tower": "vision", "intervention": "knockout"}, "vision tower"),
        ({"shard": "0/100"}, "none of"),
    ],
)
def test_settings_out_of_range_are_refused(
    settings: dict[str, Any], match: str, toy: HookedVLM, pages: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=match):
        run(config_of(pages, tmp_path / "out", **settings), toy)


def test_tests_take_pictures_as_independent() -> None:
    rng = np.random.default_rng(0)
    one = Results([(0, 0), (0, 1)])
    for number in range(12):
        effects = [-1 + rng.normal() * 0.1, rng.normal()]
        table = pd.DataFrame({"case": f"{number}", "answer": "a", "baseline": 0.0, "effect": effects})
        one.add(table, f"picture {number}")
    twice = Results(one.heads)
    for number in range(24):
        table = pd.DataFrame({"case": f"{number}", "answer": "a", "baseline": 0.0, "effect": one.rows[number // 2]})
        twice.add(table, f"picture {number // 2}")
    single: Any = head_table(one, 0)
    double: Any = head_table(twice, 0)
    columns = ["layer", "head", "effect", "low", "high", "p", "p, Holm"]
    pd.testing.assert_frame_equal(single[columns], double[columns], rtol=1e-6)
    assert single["p, Holm"][0] < 1e-6 < 0.05 < single["p, Holm"][1] and single["head"][0] == 0


def test_shards_are_put_in_order(tmp_path: Path) -> None:
    assert in_order({tmp_path / "b": (1, 2), tmp_path / "a": (0, 2)}, 5) == [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(InputError, match="divisions"):
        in_order({tmp_path / "b": (1, 2), tmp_path / "a": (0, 3)}, 5)


@pytest.mark.slow
def test_the_command_resumes_where_it_was_killed(pages: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hooked_vlm.cli", "sweep", "--data", str(pages), "--heads", "2", "--json"]
    whole = subprocess.run([*command, "--out", str(tmp_path / "whole")], capture_output=True, text=True, check=True)
    out = tmp_path / "out"
    killed = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while killed.poll() is None and len(list((out / "parts").glob("*.parquet"))) < 2:
        pass
    killed.kill()
    killed.wait()
    assert not (out / "sweep.json").exists()
    again = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["effects"] == json.loads(whole.stdout)["effects"]
    assert (out / "sweep.csv").read_bytes() == (tmp_path / "whole" / "sweep.csv").read_bytes()
    steps = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == steps[-1]["total"] == 5 and steps[-1]["unit"] == "block"


def results_of(effects: Any, pictures: list[str] | None = None) -> Results:
    """Results with these effects, [sample, head]."""
    results = Results([(0, head) for head in range(len(effects[0]))])
    for number, own in enumerate(effects):
        table = pd.DataFrame({"case": f"{number}", "answer": "a", "baseline": 0.0, "effect": own})
        results.add(table, pictures[number] if pictures else f"picture {number}")
    return results


def sentences(effects: Any, metric: str, tmp_path: Path) -> str:
    settings = {"seed": 0, "metric": metric, "tower": "language", "model": "toy", "intervention": "zero"}
    return " ".join(write_report(tmp_path, results_of(effects), {"settings": settings, "skipped": 0}).answer)


def test_an_effect_that_is_the_same_everywhere_has_no_interval_and_ties_are_told(tmp_path: Path) -> None:
    effects = [[-1.0, -1.0, 0.0, -1.0], [-1.0, -1.0, 0.0, 0.0], [-1.0, -1.0, 0.0, -1.0]]
    table: Any = head_table(results_of(effects), 0, bound=1.0).sort_values("head")
    assert table["low"].isna().tolist() == table["high"].isna().tolist() == [True, True, True, False]
    assert table["p"].isna().tolist() == [True, True, False, False] and table["p"].iloc[2] == 1
    assert table["low"].iloc[3] == -1 and head_table(results_of(effects), 0).sort_values("head")["low"].iloc[3] < -1
    unequal: Any = head_table(results_of(effects, ["a", "b", "b"]), 0)
    assert unequal["low"].isna().all()
    told = sentences(effects, "answer", tmp_path)
    assert "as large as that of 1 more" in told
    assert (
        "2 of the heads change it by the same" in told and "No other head changes it" in told and "too few" not in told
    )


@pytest.mark.parametrize(
    ("effects", "match"),
    [
        ([[1.0, 2.0]], r"0\.1 has .* by \+2\.000 nats on average over 1 sample\. There are too few"),
        ([[1.0, 2.0], [1.0, -4.0]], r"as large as that of 1 more: .* by \+1\.000 nats on average over 2 samples\."),
        ([[0.0, 1e-7]] * 3, r"by less than 0\.0005 for each of 3 samples"),
        (
            [[-1.0, -1.0]] * 3,
            r"3 samples\. 2 of the heads change it by the same for all samples: they cannot be tested\.$",
        ),
    ],
)
def test_sentences_are_true_of_few_samples(effects: Any, match: str, tmp_path: Path) -> None:
    assert re.search(match, sentences(effects, "log-prob", tmp_path))


def test_the_strongest_head_of_a_sample_may_raise_the_metric(tmp_path: Path) -> None:
    sentences([[-0.5, 2.0], [-3.0, 1.0]], "log-prob", tmp_path)
    table: Any = pd.read_parquet(tmp_path / "tables" / "samples.parquet")
    assert list(table["strongest head"]) == ["0.1", "0.0"] and list(table["its effect"]) == [2.0, -3.0]


def test_pictures_that_a_data_set_holds_are_told_apart_by_their_bytes() -> None:
    samples = [
        Sample(str(n), "What?", ({"path": "image.png", "bytes": held},)) for n, held in enumerate([b"a", b"b", b"a"])
    ]
    one, other, again = map(picture_of, samples)
    assert one == again != other
    assert picture_of(Sample("x", "What?")) == "x" and picture_of(Sample("x", "What?", (Path("a.png"),))) == "a.png"


@pytest.fixture(scope="module")
def halves(toy: HookedVLM, pages: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("halves") / f"{i}" for i in range(2)]
    for i, folder in enumerate(folders):
        run(config_of(pages, folder, shard=f"{i}/2", heads=("0.1",)), toy)
    return folders


def test_shards_of_other_samples_are_not_merged(
    halves: list[Path], toy: HookedVLM, pages: Path, tmp_path: Path
) -> None:
    grown = pages.parent / "pages.jsonl"
    before = grown.read_text(encoding="utf-8")
    try:
        first = before.splitlines()[0]
        grown.write_text(f"{before}\n{first.replace('page 0', 'page 5')}", encoding="utf-8")
        run(config_of(grown, tmp_path / "grown", shard="1/2", heads=("0.1",)), toy)
        grown.write_text("\n".join([*before.splitlines()[:-1], first]), encoding="utf-8")  # page 0 in both halves
        run(config_of(grown, tmp_path / "twice", shard="1/2", heads=("0.1",)), toy)
    finally:
        grown.write_text(before, encoding="utf-8")
    with pytest.raises(InputError, match=r"number of samples of the data \(6 and 5\)"):
        merge([halves[0], tmp_path / "grown"], tmp_path / "no")
    with pytest.raises(InputError, match="both have a sample named 'page 0'"):
        merge([halves[0], tmp_path / "twice"], tmp_path / "no")


def test_damaged_tables_are_not_merged(halves: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(halves[1], copy)
    whole = (copy / "sweep.parquet").read_bytes()
    (copy / "sweep.parquet").write_bytes(whole[:-100])
    with pytest.raises(InputError, match="damaged"):
        merge([halves[0], copy], tmp_path / "no")
    shutil.copyfile(halves[0] / "sweep.parquet", copy / "sweep.parquet")
    with pytest.raises(InputError, match="different samples"):
        merge([halves[0], copy], tmp_path / "no")
    assert not (tmp_path / "no" / "sweep.json").exists()


def test_more_shards_than_samples_and_shards_without_a_usable_one_are_merged(
    toy: HookedVLM, pages: Path, tmp_path: Path
) -> None:
    lines = pages.parent / "two.jsonl"
    rows = [pages.read_text("utf-8").splitlines()[0], json.dumps({"id": "NA", "prompt": "?", "images": ["none.png"]})]
    lines.write_text("\n".join(rows), encoding="utf-8")
    settings: Any = {"heads": ("0.1",), "on_error": "skip"}
    with pytest.raises(InputError, match="holds none"):
        run(config_of(lines, tmp_path / "0", shard="0/3", **settings), toy)
    run(config_of(lines, tmp_path / "1", shard="1/3", **settings), toy)
    with pytest.raises(InputError, match="none of the samples can be used"), pytest.warns(UserWarning, match="skipped"):
        run(config_of(lines, tmp_path / "2", shard="2/3", **settings), toy)
    with pytest.raises(InputError, match="2/3"):
        merge([tmp_path / "1"], tmp_path / "no")
    found = merge([tmp_path / "2", tmp_path / "1"], tmp_path / "merged")
    assert found.results.cases == ["page 0"] and found.n_skipped == 1
    assert pd.read_csv(tmp_path / "merged" / "skipped.csv", keep_default_na=False)["sample"].tolist() == ["NA"]


def test_no_record_stands_beside_tables_of_another_run(
    toy: HookedVLM, pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config_of(pages, tmp_path, limit=1, heads=("0.1",)), toy)
    monkeypatch.setattr("hooked_vlm.experiments.head_sweep.study.write_report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config_of(pages, tmp_path, limit=2, heads=("0.1",)), toy)
    assert len(pd.read_csv(tmp_path / "samples.csv")) == 2 and not (tmp_path / "sweep.json").exists()
