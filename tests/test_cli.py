"""The command line: what it says when things go wrong."""

import json
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from hooked_vlm import cli
from hooked_vlm.experiments.ocr_heads import ScoreConfig


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", *arguments])
    cli.main()


@pytest.mark.parametrize("command", ["all", "score", "select", "mask", "sink", "thought", "case", "compare"])
def test_every_experiment_has_a_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[ScoreConfig] = []

    def remember(config: ScoreConfig) -> SimpleNamespace:
        asked.append(config)
        return SimpleNamespace(summary=f"ran {type(config).__name__}", scores={}, report=Path("out/report.html"))

    monkeypatch.setattr("hooked_vlm.experiments.ocr_heads.commands.run", remember)
    call(monkeypatch, "ocr-heads", command, "--samples", "7", "--query", "copied")
    assert f"ran {type(asked[0]).__name__}" in capsys.readouterr().out
    assert (asked[0].samples, asked[0].protocol.query) == (7, "copied")


@pytest.mark.parametrize(
    ("word", "said"), [("vew", "did you mean view?"), ("ocr-head", "did you mean ocr-heads?"), ("xyz", "models, hooks")]
)
def test_a_command_that_is_none_is_refused_with_the_nearest(
    word: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, word, "--samples", "7")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert f"no command {word}" in message and said in message and message.count("\n") == 1


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, "--version")
    assert capsys.readouterr().out == f"hooked-vlm {version('hooked-vlm')}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "./nowhere"], "nowhere"),
        (["--model", "owner/model"], "connection"),
        (["--samples", "0"], "--samples"),
        (["--out", "/dev/null/x"], "/dev/null/x"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_no_traceback(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "ocr-heads", "score", *arguments, *out)
    message = str(stopped.value)
    assert words in message and "\n" not in message


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    def warn(config: ScoreConfig) -> SimpleNamespace:
        warnings.warn("results are made anew", stacklevel=1)
        return SimpleNamespace(summary="done", scores={}, report=Path("out/report.html"))

    monkeypatch.setattr("hooked_vlm.experiments.ocr_heads.commands.run", warn)
    call(monkeypatch, "ocr-heads", "score")
    assert capsys.readouterr().err == "hooked-vlm: results are made anew\n" and not recwarn.list


@pytest.mark.repeats_shapes
@pytest.mark.usefixtures("sketches")
def test_json_is_all_that_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call(monkeypatch, "ocr-heads", "score", "--samples", "2", "--out", str(out), "--json", "--quiet")
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert printed.err == "" and found["report"] == str(out / "report.html")
    assert found["scores"]["ocr"] == {
        f"{row['layer']}.{row['head']}": pytest.approx(row["score"])
        for row in pd.read_parquet(found["tables"]["ocr-scores"]).to_dict("records")
    }
    call(
        monkeypatch,
        "head-attribution",
        "attribute",
        "--samples",
        "2",
        "--masks",
        "40",
        "--out",
        str(out / "b"),
        "--json",
    )
    printed = capsys.readouterr()
    assert "step 1 of" in printed.err  # bars go where they do not mix with the answer
    found = json.loads(printed.out)["findings"]
    ends = {"low", "high", "low_by_name", "high_by_name"}
    assert set(found["held-out Pearson"]) == {"value", "n", "names", *ends} and found["answered correctly"]["n"] == 2
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "ocr-heads", "score", "--samples", "0", "--out", str(out), "--json")
    assert stopped.value.code == 1
    told = json.loads(capsys.readouterr().out)
    assert told.keys() == {"error", "kind"} and told["kind"] == "StudyError" and "--samples" in told["error"]


def test_every_command_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "--help")
    contents = capsys.readouterr().out
    for command in cli.app._subcommands:
        assert f"• {command} " in contents
        with pytest.raises(SystemExit):
            call(monkeypatch, command, "--help")
        assert f"usage: hooked-vlm {command}" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_get_their_completions(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "completion", shell)
    assert not stopped.value.code
    script = capsys.readouterr().out
    assert "head-attribution" in script and "--mask-heads" in script


def test_a_reader_who_has_seen_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(SystemExit) as stopped:
            call(monkeypatch, "--help")
    assert stopped.value.code == 141


def test_an_interrupt_leaves_nothing_half_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hooked_vlm.experiments.ocr_heads.study.score_batch", interrupted)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "ocr-heads", "score", "--out", str(tmp_path / "out"), "--quiet")
    assert stopped.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data"]  # whole data sets, and nothing else
