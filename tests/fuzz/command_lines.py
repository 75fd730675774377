"""Cases made of command lines."""

import io
import os
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from fuzz.draws import Draws
from fuzz.laws import held
from fuzz.seeds import picture
from hooked_vlm import cli

WORDS: dict[str, tuple[str, ...]] = {
    "ocr-heads": ("--samples", "--lengths", "--threshold", "--tokens-per-batch", "--seed", "--data", "--granularity",
                  "--protocol.query", "--max-new-tokens", "--min-frequency", "--text-model", "--compat"),
    "head-attribution": ("--samples", "--masks", "--held-out", "--keep", "--images", "--annotations", "--top",
                         "--window", "--target", "--baseline", "--regression", "--bootstrap", "--min-object", "--runs"),
    "view": ("--image", "--prompt", "--heads", "--box", "--max-pixels", "--max-tiles", "--tower", "--answer",
             "--max-new-tokens", "--query"),
}  # fmt: skip
SUBCOMMANDS = {
    "ocr-heads": ("score", "select", "mask", "sink", "case", "x"),
    "head-attribution": ("attribute", "compare", "tokens", "x"),
    "view": ("",),
}
VALUES = ("0", "-1", "1", "nan", "inf", "1e999", "", "x", "2.1", "99.0", "0.5", "zero", "toy", "coco", "/dev/null",
          "nowhere", "\0", "\ud800", "1" * 400, "--", "-", "1 1 2 2", "None", "True")  # fmt: skip


def command_line(data: bytes) -> str:
    """Arguments of every command; what they ask for is not run, but every check before it is."""

    def case(folder: Path) -> str:
        draws = Draws(data)
        command = draws.pick(list(WORDS))
        image = folder / "a.png"
        picture().save(image)
        arguments = [command, draws.pick(SUBCOMMANDS[command])]
        if command == "view":
            arguments += [
                "--image",
                str(image),
                "--prompt",
                "What is the value of a1?",
                "--no-open",
                "--max-new-tokens",
                "1",
            ]
        else:
            arguments += ["--model", draws.pick(("toy-qwen2-vl", "nowhere", "./x", "a/b", "", "\0", "/dev/null"))]
        if not draws.one_in(8):
            arguments += ["--out", str(folder / draws.pick(("out", "out.html", "a.png", "a.png/x", "\0", "x" * 300)))]
        for _ in range(draws.below(4)):
            arguments.append(draws.pick(WORDS[command]))
            arguments += [draws.pick(VALUES) for _ in range(draws.pick((1, 1, 0, 2, 4)))]
        return outcome_of([a for i, a in enumerate(arguments) if a or i != 1], folder)

    return held(case)


class Reached(Exception):
    """The command passed its checks; its work begins."""


def outcome_of(arguments: list[str], folder: Path) -> str:
    def begin(*_: Any, **__: Any) -> Any:
        raise Reached

    here = os.getcwd()
    os.chdir(folder)
    with ExitStack() as patched:
        for name in WORK:
            patched.enter_context(mock.patch(name, begin))
        patched.enter_context(mock.patch("sys.argv", ["hooked-vlm", *arguments]))
        said = patched.enter_context(redirect_stderr(io.StringIO()))
        patched.enter_context(redirect_stdout(io.StringIO()))
        try:
            cli.main()
        except Reached:
            return "reached its work"
        except SystemExit as stop:
            message = stop.code if isinstance(stop.code, str) else said.getvalue()
            if stop.code not in (0, None) and not message:
                raise AssertionError("stopped without a word") from stop
            return "refused by the parser" if stop.code == 2 else "told" if isinstance(stop.code, str) else "ended"
        finally:
            os.chdir(here)
    return "ended"


WORK = ("hooked_vlm.experiments.ocr_heads.pipeline.Study", "hooked_vlm.experiments.head_attribution.study.measure",
        "hooked_vlm.model.vlm.HookedVLM.generate")  # fmt: skip
