"""The experiments from end to end: what they change, what they write, what they refuse, and that they resume."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.errors import CheckpointError, OutputError, StudyError
from hooked_vlm.experiments.ocr_heads import (
    CaseConfig,
    CompareConfig,
    MaskConfig,
    OcrHeadsConfig,
    Protocol,
    ScoreConfig,
    SelectConfig,
    SinkConfig,
    ThoughtConfig,
    run,
)
from hooked_vlm.experiments.ocr_heads import changed as changed_module
from hooked_vlm.experiments.ocr_heads.chain_of_thought import judged_by_ends
from hooked_vlm.experiments.ocr_heads.changed import answer_all, tasks_of
from hooked_vlm.experiments.ocr_heads.controls import choose_heads
from hooked_vlm.experiments.ocr_heads.data.scored import PAPER_PIXELS, passkey_pages, toy_pages
from hooked_vlm.experiments.ocr_heads.data.store import DataSet
from hooked_vlm.experiments.ocr_heads.data.tasks import QATask
from hooked_vlm.experiments.ocr_heads.examples import prompt_length, to_inputs
from hooked_vlm.experiments.ocr_heads.masking import masking_conditions
from hooked_vlm.experiments.ocr_heads.sink_shares import PLACES, QUERIES, first_token_shares
from hooked_vlm.experiments.ocr_heads.study import Study

SMALL: dict[str, Any] = {"samples": 4, "quiet": True, "device": "cpu", "max_new_tokens": 6}
TASKS: dict[str, Any] = {"task_samples": 4, "random_draws": 2}


def masks(out: Path, **changes: Any) -> MaskConfig:
    return MaskConfig(**{**SMALL, **TASKS, "out": out, **changes})


# ---------------------------------------------------------------- masking


def is_result(path: Path) -> bool:
    """Whether a file is the same after every run: all but the times of its progress."""
    return path.is_file() and path.name != "progress.jsonl"


@pytest.mark.repeats_shapes
def test_masking_equals_zeroing_outputs_by_hand(toy: HookedVLM, tmp_path: Path) -> None:
    config = masks(tmp_path, tasks=("page",))
    study = Study(config, toy)
    conditions = masking_conditions([choose_heads(study, config, 2)], config.modes)
    answers = answer_all(study, tasks_of(study, config), conditions, "")
    top = next(c for c in conditions if c.name == "top 2 OCR")

    def zero(head: int) -> Any:
        def hook(z: torch.Tensor, hook: object) -> None:
            z[:, :, head] = 0

        return hook

    hooks = [(f"blocks.{layer}.attn.hook_z", zero(head)) for layer, head in top.heads]
    found = answers[answers["condition"] == top.name].set_index("sample")
    for i, example in enumerate(tasks_of(study, config)[0].data.examples):
        reply = toy.generate(to_inputs(toy, [example], None), 6, fwd_hooks=hooks, return_type="str")
        assert found.loc[i, "reply"] == reply
        assert found.loc[i, "exact"] == (reply.strip() == example.answer)
    randoms = [c for c in conditions if c.name.startswith("random")]
    assert len({c.heads for c in randoms}) == 2 and [c.draw for c in randoms] == [0, 1]
    assert all(len(c.heads) == 2 and not set(c.heads) & set(top.heads) for c in randoms)


# ---------------------------------------------------------------- the run


def small(kind: Any, out: Path) -> Any:
    """The study at its smallest."""
    few = {**SMALL, "samples": 3, "task_samples": 2, "random_draws": 1, "tokens_per_batch": 400}
    more = {"betas": (0.4,), "case_samples": 2, "characters": "7q", "permutations": 5} if kind is OcrHeadsConfig else {}
    return kind(**few, **more, data_folder=out.parent / "data", out=out)


@pytest.mark.parametrize("kind", [MaskConfig, pytest.param(OcrHeadsConfig, marks=pytest.mark.full)])
@pytest.mark.repeats_shapes
def test_an_interrupted_run_ends_with_the_same_bytes(
    kind: Any, qwen: HookedVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(small(kind, tmp_path / "whole"), qwen)
    answer = changed_module.answers_of
    calls = []

    def interrupted(*arguments: Any) -> pd.DataFrame:
        calls.append(1)
        if len(calls) == 4:  # some answers are kept by then
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(changed_module, "answers_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(small(kind, tmp_path / "resumed"), qwen)
    assert not (tmp_path / "resumed" / "report.html").exists()
    calls = [0] * 100  # of which none is the fourth
    again = run(small(kind, tmp_path / "resumed"), qwen)
    whole, resumed = (
        sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*") if is_result(path))
        for name in ("whole", "resumed")
    )
    assert whole == resumed
    for file in whole:
        a, b = ((tmp_path / name / file).read_bytes() for name in ("whole", "resumed"))
        if file.suffix in (".html", ".json"):  # name their folder
            b = b.replace(b"/resumed", b"/whole")
        assert a == b, file
    assert again.summary.replace("/resumed", "/whole").split(" (")[0] == result.summary.split(" (")[0]


def test_everything_runs(qwen: HookedVLM, tmp_path: Path) -> None:
    result = run(small(OcrHeadsConfig, tmp_path / "whole"), qwen)
    headings = [finding.heading for finding in result.findings]
    assert len(headings) == 7 and all(heading in result.summary for heading in headings)
    scores = result.table("ocr-scores")
    assert len(scores) == 16 and scores["score"].between(0, 1).all() and (scores["low"] <= scores["high"]).all()
    assert set(result.table("masking")["task"]) == {"page", "text", "naming"}
    assert set(result.table("characters")["character"]) == {"7", "q"}
    page = (tmp_path / "whole" / "report.html").read_text()
    assert all(heading in page for heading in headings)


@pytest.mark.parametrize(
    ("kind", "more"),
    [(ScoreConfig, {}), (SelectConfig, {"permutations": 20}), (CompareConfig, {}), (ScoreConfig, {"compat": True})],
)
@pytest.mark.repeats_shapes
def test_single_experiments_run_in_both_families(kind: Any, more: dict, toy: HookedVLM, tmp_path: Path) -> None:
    result = run(kind(**SMALL, out=tmp_path, **more), toy)
    assert result.report.exists()
    assert result.scores["ocr"].granularity == ("token" if more.get("compat") else "sample")
    assert ("compat" in result.summary) == bool(more.get("compat"))


def test_attention_on_the_first_token_is_that_of_the_patterns(toy: HookedVLM) -> None:
    examples = toy_pages(5, 3) + toy_pages(5, 1)
    found = first_token_shares(toy, examples, None)
    for i, example in enumerate(examples):
        inputs = to_inputs(toy, [example], None)
        _, cache = toy.run_with_cache(inputs, names_filter=lambda name: name.endswith("hook_pattern"))
        n = inputs.shape[1]
        queries = [round(1 + step * (n - 2) / (QUERIES - 1)) for step in range(QUERIES)]
        for layer in range(toy.cfg.n_layers):
            rows = cache["pattern", layer][0]
            expected = [np.mean([float(rows[head, q, 0]) for q in queries]) for head in range(toy.cfg.n_heads)]
            np.testing.assert_allclose(found[i, PLACES.index("over the prompt"), layer], expected, atol=1e-6)
            np.testing.assert_allclose(found[i, 0, layer], rows[:, -1, 0].detach().numpy(), atol=1e-6)


@pytest.mark.repeats_shapes
def test_the_sink_section_says_how_much_there_is_to_redistribute(qwen: HookedVLM, tmp_path: Path) -> None:
    result = run(SinkConfig(**SMALL, **TASKS, out=tmp_path, betas=(1.0,), tasks=("page", "text")), qwen)
    table = result.table("sink-attention")
    assert len(table) == 16 and (table["n"] == 8).all()
    for place in PLACES:
        assert (table[f"low, {place}"] <= table[place]).all() and (table[place] <= table[f"high, {place}"]).all()
    by_head = table.set_index(["layer", "head"])[PLACES[0]]
    assert by_head.is_monotonic_decreasing
    line = next(
        line for line in result.summary.splitlines() if line.startswith("attention on the first token, top 2 OCR")
    )
    assert f" {np.mean([by_head[2, 0], by_head[2, 1]]):.2%} (" in line and "n = 8" in line


@pytest.mark.repeats_shapes
def test_steps_are_written_out_on_samples_that_heads_were_not_scored_on(qwen: HookedVLM, tmp_path: Path) -> None:
    config = ThoughtConfig(**{**SMALL, **TASKS, "samples": 2, "task_samples": 3}, out=tmp_path)
    result = run(config, qwen)
    table = result.table("thought")
    assert (table["n"] == 3).all() and set(table["task"]) == {"toy", "toy-steps", "toy-steps, ends"}
    assert (result.table("thought-lengths")["most tokens"] <= [6, 6, 24]).all()
    assert {"direct, answered", "with steps, answered"} <= set(result.table("thought-heads").columns)
    study = Study(config, qwen)
    scored, asked = study.scored(as_text=False)[0], study.sets(False, config.seed + 1, 3)[0]
    assert not {e.prompt for e in scored.examples} & {e.prompt for e in asked.examples}


def test_replies_with_steps_are_judged_by_ends_as_long_as_direct_replies(qwen: HookedVLM) -> None:
    """By hand: an answer in the last four tokens counts, one before them does not, however long the reply."""
    example = toy_pages(3, 1)[0]
    task = QATask(DataSet("toy-steps", [example] * 3, "made", "abc"), "contains")
    replies = [f"zz {example.answer}", f"{example.answer} zz zz", f"{example.answer}{'q' * 30}"]
    answers = pd.DataFrame({"reply": replies, "task": "toy-steps", "sample": range(3), "contains": 1.0})
    n = len(qwen.tokenizer(example.answer, add_special_tokens=False)["input_ids"])
    ends = judged_by_ends(qwen, answers, [task], n)
    assert ends["contains"].tolist() == [1, 0, 0] and set(ends["task"]) == {"toy-steps, ends"}
    assert ends["reply"].tolist()[0] == example.answer
    assert judged_by_ends(qwen, answers, [task], 99)["contains"].tolist() == [1, 1, 1]


@pytest.mark.repeats_shapes
def test_sink_and_uniform_masking_run_and_the_unmodified_model_is_the_same_in_all(
    qwen: HookedVLM, tmp_path: Path
) -> None:
    sink = run(SinkConfig(**SMALL, **TASKS, out=tmp_path, betas=(1.0,), tasks=("page",)), qwen).table("sink")
    assert (sink["change"] == 0).all()  # the sink keeps everything
    mask = run(masks(tmp_path, modes=("uniform",), tasks=("page",)), qwen).table("masking")
    unchanged = [table.set_index("condition").loc["unchanged", "value"] for table in (sink, mask)]
    assert unchanged[0] == unchanged[1]
    assert {"top 2 OCR, uniform", "top 2 retrieval, uniform"} <= set(mask["condition"])


@pytest.mark.repeats_shapes
def test_a_text_only_sibling_with_the_same_decoder_has_the_same_scores(
    toy: HookedVLM, text_only: Callable[[HookedVLM, Path], Path], tmp_path: Path
) -> None:
    folder = text_only(toy, tmp_path / "sibling")
    result = run(SelectConfig(**SMALL, out=tmp_path / "out", text_model=str(folder), permutations=20), toy)
    own, siblings = (result.table(f"{name}-scores") for name in ("retrieval", "retrieval-in-the-text-model"))
    pd.testing.assert_frame_equal(own, siblings, atol=1e-5)
    assert own["score"].max() > 0.5
    similarity = result.table("similarity").set_index("measure")
    assert similarity.index.str.endswith("(text model)").sum() == len(similarity) / 2
    for name in ("Spearman", "Jaccard, selected (active)"):
        assert similarity.loc[name].equals(similarity.loc[f"{name} (text model)"])
        assert similarity.loc[name].notna().all()
    assert "retrieval, text model, here" in set(result.table("sparsity")["heads"])


def test_a_text_only_model_is_asked_on_data_with_a_page_size(
    qwen: HookedVLM, text_only: Callable[[HookedVLM, Path], Path], tmp_path: Path
) -> None:
    blind = HookedVLM.from_pretrained(text_only(qwen, tmp_path / "sibling"), device="cpu")
    examples, _ = passkey_pages(0, 2, (64,), as_text=True)
    seeing, without = (to_inputs(model, examples, PAPER_PIXELS) for model in (qwen, blind))
    assert seeing.tokens.equal(without.tokens)
    assert prompt_length(blind, examples[0], PAPER_PIXELS) == prompt_length(qwen, examples[0], PAPER_PIXELS)


def test_a_text_model_that_is_none_is_refused_before_anything_is_scored(qwen: HookedVLM, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="/nowhere"):
        run(ScoreConfig(**SMALL, out=tmp_path / "out", text_model="/nowhere"), qwen)
    assert not (tmp_path / "out" / "parts").exists()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ScoreConfig(samples=0), "--samples"),
        (ScoreConfig(threshold=1.5), "--threshold"),
        (MaskConfig(mask_heads=(0,)), "--mask-heads"),
        (ScoreConfig(seed=-1), "--seed"),
        (ScoreConfig(lengths=()), "--lengths"),
        (ScoreConfig(protocol=Protocol(min_overlap=2.0)), "min-overlap"),
        (SinkConfig(betas=(1.5,)), r"--betas.*1\.5"),
        (SinkConfig(betas=(0.4, 0.4)), r"--betas.*0\.4, 0\.4"),
        (SinkConfig(betas=()), "--betas"),
        (MaskConfig(mask_heads=(2, 2)), "--mask-heads.*2, 2"),
        (MaskConfig(tasks=("page", "page")), "--tasks.*page, page"),
        (MaskConfig(modes=()), "--modes"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_loaded(
    config: ScoreConfig, words: str, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match=words):
        run(replace(config, model="/nowhere", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MaskConfig(mask_heads=(17,)), "--mask-heads 17.*16"),
        (SinkConfig(sink_heads=(99,)), "--sink-heads 99.*16"),
        (MaskConfig(tasks=("vqa",)), "'vqa'"),
        (CaseConfig(characters="A"), "--characters.*'A'"),
        (CaseConfig(characters=""), "--characters.*''"),
        (CaseConfig(case_samples=1), "--case-samples.*1"),
        (ThoughtConfig(task_samples=-1), "--task-samples"),
    ],
)
@pytest.mark.repeats_shapes
def test_what_the_model_or_the_data_do_not_have_is_named(
    config: Any, words: str, qwen: HookedVLM, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match=words):
        run(replace(config, **{**SMALL, "samples": 3}, out=tmp_path), qwen)


def test_a_model_that_cannot_be_asked_about_images_is_refused_before_any_page_is_made(
    qwen: HookedVLM, tmp_path: Path
) -> None:
    blind = copy.copy(qwen)
    blind.cfg = blind.cfg.with_(vision=None)
    with pytest.raises(StudyError, match="vision"):
        run(ScoreConfig(**SMALL, out=tmp_path), blind)
    silent = copy.copy(qwen)
    silent.tokenizer = None
    with pytest.raises(StudyError, match="tokenizer"):
        run(ScoreConfig(**SMALL, out=tmp_path), silent)
    assert not (tmp_path / "data").exists()


def test_an_output_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="/file"):
        run(ScoreConfig(**SMALL, out=tmp_path / "file"))


# ---------------------------------------------------------------- what the toy models show


@pytest.mark.slow
def test_ocr_heads_exist_are_few_and_are_what_reading_needs(toy: HookedVLM, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"out": tmp_path, "quiet": True, "samples": 60, "task_samples": 60}
    mask = run(MaskConfig(**shared), toy)
    chosen = mask.scores["ocr"].mean > 0.1
    assert 1 <= chosen.sum() <= 4
    table = mask.table("masking").set_index(["task", "condition"])
    page = table.loc["page"]
    assert page.loc["unchanged", "value"] > 0.9
    assert page.loc["top 2 OCR", "value"] < 0.2 < page.loc["random 2 live", "value"] - 0.3
    tests = mask.table("masking-against-random").set_index(["task", "condition"])
    assert tests.loc[("page", "top 2 OCR"), "p"] == 1 / 21  # below all of 20 draws
    assert tests.loc[("naming", "top 2 OCR"), "p"] > 0.05
    assert table.loc[("naming", "top 2 OCR"), "value"] > 0.8
    retrieval = mask.scores["retrieval"].mean > 0.1
    assert 1 <= retrieval.sum() <= 8
