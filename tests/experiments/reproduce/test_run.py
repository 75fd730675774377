"""Reproductions from end to end: one page, one check, resumption, exit status, refusals."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from families import bundled
from made_up_results import evidence

from hooked_vlm import cli
from hooked_vlm.errors import InputError, StudyError
from hooked_vlm.experiments.reproduce import (
    Claim,
    Judgement,
    Number,
    ReproduceConfig,
    Reproduction,
    pipeline,
    run,
    sizes,
)
from hooked_vlm.experiments.reproduce.page import command_of, write_page
from hooked_vlm.experiments.reproduce.verification import judged
from hooked_vlm.verify import run as verify_run

TOY = "toy-qwen2-vl"
SMALLEST: dict[str, Any] = {
    "ocr-heads": {
        "samples": 3, "permutations": 20, "task_samples": 2, "random_draws": 2, "case_samples": 2, "characters": "01",
    },
    "head-attribution": {"samples": 3, "masks": 40, "token_masks": 60, "random_rankings": 1},
}  # fmt: skip


@pytest.fixture
def smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "OCR_HEADS", {"small": SMALLEST["ocr-heads"]})
    monkeypatch.setattr(sizes, "HEAD_ATTRIBUTION", {"small": SMALLEST["head-attribution"]})


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every comparison with transformers that is made, each a quick one."""
    made, verify = [], verify_run.verify

    def counted(config: Any) -> Any:
        made.append(config)
        return verify(replace(config, quick=True))

    monkeypatch.setattr(verify_run, "verify", counted)
    return made


@pytest.mark.repeats_shapes
@pytest.mark.usefixtures("smallest")
@pytest.mark.parametrize("paper", ["ocr-heads", pytest.param("head-attribution", marks=pytest.mark.full)])
def test_a_reproduction_is_one_page_and_resumes(
    paper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checks: list[Any]
) -> None:
    config = ReproduceConfig(TOY, paper=paper, out=tmp_path, quiet=True)
    finish = pipeline.write_page

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "write_page", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, bundled(TOY))
    assert not (tmp_path / "report.html").exists()
    monkeypatch.setattr(pipeline, "write_page", finish)
    before = json.loads((tmp_path / "seconds.json").read_text())["steps"]
    result = run(config, bundled(TOY))
    assert len(checks) == 1  # the check of the first run is of the same model
    check, *claims = result.judged
    assert check[1].verdict == "pass" and "agree in float32" in check[1].reason
    assert len(claims) >= 10 and all(own.reason for _, own in claims)
    page = result.page.read_text(encoding="utf-8")
    assert page.index(">Answer<") < page.index(">Results<") < page.index(">Tables</h2>")
    assert all(claim.name in page for claim, _ in claims)
    table = pd.read_parquet(tmp_path / "tables" / "claims.parquet")
    assert list(table["verdict"]) == [own.verdict for _, own in result.judged]
    named = [name for name in result.seconds if name.startswith("study: ")]
    assert len(named) >= 7 and {"verify", "load the model", "study", "total"} <= result.seconds.keys()
    assert result.seconds["study"] == before["study"][0] >= sum(result.seconds[name] for name in named)
    assert (tmp_path / paper / "report.html").exists()


def test_the_check_is_made_again_for_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checks: list[Any]
) -> None:
    """A record that is not of the model's weights does not count."""

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "study", stop)
    config = ReproduceConfig(TOY, paper="ocr-heads", out=tmp_path, quiet=True)
    for wanted in (1, 1, 2):
        if wanted == 2:
            record = json.loads((tmp_path / "verify.json").read_text())
            (tmp_path / "verify.json").write_text(json.dumps(record | {"weights": "0" * 16}))
        with pytest.raises(KeyboardInterrupt):
            run(config, bundled(TOY))
        assert len(checks) == wanted


def test_a_check_that_cannot_be_made_or_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any) -> None:
        raise InputError("both models need too much memory")

    monkeypatch.setattr(verify_run, "verify", refuse)
    config = ReproduceConfig(TOY, paper="ocr-heads", out=tmp_path, quiet=True)
    record = pipeline.check_against_transformers(config, tmp_path / "verify.json")
    own = evidence()
    found = judged(record).judge(own)
    assert found.verdict == "cannot say" and "memory" in found.reason
    rows = [{"quantity": "logits", "passed": False}, {"quantity": "prompts", "passed": True}]
    failed = judged({"rows": rows, "passed": False, "dtype": "float32"}).judge(own)
    assert failed.verdict == "differs" and "1 of 2" in failed.reason and "logits" in failed.reason


def made_up(verdict: Any, out: Path) -> Reproduction:
    claim = Claim("sparse", "Few heads read.", "The interval lies below 25%.", lambda evidence: own)
    own = Judgement(verdict, "because", Number("share", 0.1, 0.05, float("nan"), 9, unit="%"), "8.7%")
    config = ReproduceConfig(TOY, paper="ocr-heads", out=out, quiet=True)
    seconds = {"verify": 1.0, "total": 200.0}
    found = [(judged({"error": "no memory"}), Judgement("cannot say", "no memory")), (claim, own)]
    page, answer = write_page(config, found, seconds, bundled(TOY), {"paper": "ocr-heads"})
    return Reproduction(config, found, seconds, page, answer)


@pytest.mark.parametrize(("verdict", "status"), [("pass", 0), ("cannot say", 0), ("differs", 1)])
def test_the_exit_status_is_1_if_a_claim_differs(
    verdict: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def answer(config: ReproduceConfig) -> Reproduction:
        asked.append(config)
        return made_up(verdict, tmp_path)

    monkeypatch.setattr("hooked_vlm.experiments.reproduce.commands.run", answer)
    words = ["reproduce", TOY, "--paper", "ocr-heads", "--size", "paper", "--compat", "--quiet"]
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["hooked-vlm", *words, *more])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == status
        printed = capsys.readouterr().out
        if more:
            found = json.loads(printed)  # without NaN
            assert found["claims"][1]["verdict"] == verdict and found["claims"][1]["number"]["high"] is None
            assert (
                found["passed"] == (not status) and Path(found["report"]).exists() and found["seconds"]["total"] == 200
            )
        else:
            assert verdict in printed and "sparse" in printed and "3 min" in printed
    assert asked[0] == ReproduceConfig(TOY, paper="ocr-heads", size="paper", compat=True, quiet=True)
    assert command_of(asked[0]) == f"hooked-vlm reproduce {TOY} --paper ocr-heads --size paper --compat"


def test_settings_of_the_other_paper_are_refused(tmp_path: Path) -> None:
    config = ReproduceConfig(TOY, paper="head-attribution", compat=True, out=tmp_path / "out")
    with pytest.raises(StudyError, match="--compat"):
        run(config)
    with pytest.raises(StudyError, match="--images"):
        run(replace(config, compat=False, paper="ocr-heads", images=tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("paper", ["ocr-heads", "head-attribution"])
@pytest.mark.parametrize("size", ["small", "paper"])
def test_both_sizes_are_settings_that_the_studies_accept(paper: Any, size: Any) -> None:
    own = sizes.study_config(ReproduceConfig(TOY, paper=paper, size=size, seed=3))
    own.check()
    assert own.seed == 3 and own.out == Path("reproduce-out") / paper
