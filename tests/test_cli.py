"""The command line: what it says when things go wrong."""

import sys
from pathlib import Path
from types import SimpleNamespace

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
        return SimpleNamespace(summary=f"ran {type(config).__name__}")

    monkeypatch.setattr(cli, "run_ocr_heads", remember)
    call(monkeypatch, "ocr-heads", command, "--samples", "7", "--query", "copied")
    assert f"ran {type(asked[0]).__name__}" in capsys.readouterr().out
    assert (asked[0].samples, asked[0].protocol.query) == (7, "copied")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no-such-model"], "there is no checkpoint folder"),
        (["--model", "./nowhere"], "there is no checkpoint folder"),
        (["--model", "owner/model"], "cannot get 'owner/model' from the hub"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--out", "/dev/null/x"], "cannot write"),
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
