"""The command line: what it says when things go wrong."""

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from tqdm import tqdm

from hooked_vlm import cli
from hooked_vlm.errors import StudyError
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


USAGE_ERRORS = {
    "an unknown option": (["ocr-heads", "mask", "--sample", "3"], "--sample"),
    "no argument where one is required": (["hooks"], "MODEL"),
    "no value": (["cache", "--data"], "--data"),
    "a value that is none of the choices": (["verify", "toy-qwen2-vl", "--dtype", "int8"], "int8"),
    "a value that is no number": (["view", "--max-tiles", "x"], "--max-tiles"),
    "an unknown command": (["vew"], "did you mean view?"),
    "an unknown study": (["ocr-heads", "scoer"], "scoer"),
    "no command": ([], "--json"),
}


@pytest.mark.parametrize("case", USAGE_ERRORS)
def test_usage_errors_are_one_json_object_if_json_is_asked_for(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = USAGE_ERRORS[case]
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *arguments, "--json")
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert stopped.value.code == 2 and printed.err == ""
    assert told.keys() == {"error", "kind"} and told["kind"] == "UsageError"
    assert words in told["error"] and not set("│╭╯─\n") & set(told["error"])


def test_usage_errors_without_json_leave_standard_output_empty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "ocr-heads", "mask", "--sample", "3")
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == "" and "--sample" in printed.err


def test_the_printed_text_fits_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    call(monkeypatch, "ocr-heads", "score", "--samples", "2", "--out", str(tmp_path / "out"), "--quiet")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5 and all(len(line) <= 80 or str(tmp_path) in line for line in lines)


@pytest.mark.filterwarnings("default")
def test_quiet_leaves_nothing_but_errors(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    def noisy(config: ScoreConfig) -> SimpleNamespace:
        warnings.warn("precision", stacklevel=1)
        for name in ("transformers", "ray", "somebody"):
            logging.getLogger(name).warning("noise")
        for _ in tqdm(range(2), disable=None if config.quiet else False):
            pass
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
        if config.samples == 3:
            raise StudyError("no")
        return SimpleNamespace(summary="done", scores={}, report=Path("out/report.html"))

    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("WANDB_SILENT", raising=False)
    monkeypatch.setattr("hooked_vlm.experiments.ocr_heads.commands.run", noisy)
    call(monkeypatch, "ocr-heads", "score", "--quiet")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("done\n", "") and not recwarn.list
    with pytest.raises(SystemExit, match="hooked-vlm: no"):
        call(monkeypatch, "ocr-heads", "score", "--quiet", "--samples", "3")
    assert capfd.readouterr().err == ""
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info" and "WANDB_SILENT" not in os.environ
    assert logging.root.manager.disable == logging.NOTSET


def test_errors_of_the_library_name_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"id": "a", "prompt": "what"}\n')
    wanted = ["cache", "--data", str(data), "--names", "hook_embed", "--out", str(tmp_path / "out")]
    for option in ("--tokens-per-batch", "--min-overlap", "--shard-megabytes"):
        with pytest.raises(SystemExit) as stopped:
            call(monkeypatch, *wanted, option, "-1")
        message = str(stopped.value)
        assert option in message and option[2:].replace("-", "_") not in message


def test_every_command_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "--help")
    contents = capsys.readouterr().out
    for command in cli.app._subcommands:
        assert f"• {command} " in contents
        with pytest.raises(SystemExit):
            call(monkeypatch, command, "--help")
        contents_of_one = capsys.readouterr().out
        assert f"usage: hooked-vlm {command}" in contents_of_one
        assert "config options" not in contents_of_one and "output options" not in contents_of_one
        assert "{None}" not in contents_of_one


def test_help_shows_what_may_be_left_out_and_what_flags_switch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    helps = {}
    for command in ("models", "merge", "view"):
        with pytest.raises(SystemExit):
            call(monkeypatch, command, "--help")
        helps[command] = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "OPTIONS] [MODEL]" in helps["models"] and "FOLDER [FOLDER ...]" in helps["merge"]
    assert "--no-open Do not show the page in the browser. --device" in helps["view"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_their_completions(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "completion", shell)
    assert not stopped.value.code
    script = capsys.readouterr().out
    assert "head-attribution" in script and "--mask-heads" in script
    if program := shutil.which(shell):
        checked = subprocess.run([program, "-n"], input=script, capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes_commands_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "completion", "fish")
    (tmp_path / "hooked-vlm.fish").write_text(capsys.readouterr().out)
    for line, offered in (("hooked-vlm vi", "view"), ("hooked-vlm ocr-heads mask --mask-h", "--mask-heads")):
        words = f"source {tmp_path}/hooked-vlm.fish; complete -C '{line}'"
        done = subprocess.run(["fish", "--no-config", "-c", words], capture_output=True, text=True)
        assert offered in {shown.split("\t")[0] for shown in done.stdout.splitlines()}, done


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
