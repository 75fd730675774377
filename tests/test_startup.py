"""Start-up: help and completion import no tensor library, and an interrupt ends a command in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "pandas", "matplotlib", "PIL", "numpy")

IMPORTED = """
import sys
from hooked_vlm import cli
try:
    cli.main()
finally:
    print(*(name for name in {heavy} if name in sys.modules), file=sys.stderr)
"""

INTERRUPTING = """
import os, signal, time
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as tests in the background inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""


def python(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter; modules in `folder` come before installed ones."""
    paths = [str(Path(__file__).resolve().parent.parent), *sys.path]
    code = f"import sys; sys.path[:] = {[*([str(folder)] if folder else []), *paths]}\n{arguments[0]}"
    return subprocess.run([sys.executable, "-c", code, *arguments[1:]], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["cache", "--help"], 0),
        (["head-attribution", "all", "--help"], 0),
        (["reproduce", "--help"], 0),
        (["steer", "--help"], 0),
        (["features", "train", "--help"], 0),
        (["demo", "--help"], 0),
        (["atlas", "--help"], 0),
        (["modles"], 2),
        (["ocr-heads", "mask", "--sample", "3"], 2),
        (["hooks", "--json"], 2),
        (["completion", "bash"], 0),
        (["completion", "fish"], 0),
    ],
)
def test_help_mistypes_and_completion_import_no_tensor_library(arguments: list[str], status: int) -> None:
    done = python(IMPORTED.format(heavy=HEAVY), *arguments)
    assert done.returncode == status, done.stderr
    assert done.stderr.splitlines()[-1] == ""


def test_importing_the_package_imports_nothing_else() -> None:
    done = python(f"import hooked_vlm; print(*(name for name in {HEAVY} if name in sys.modules), end='')")
    assert (done.returncode, done.stdout) == (0, "")


def test_submodules_are_there_after_a_bare_import() -> None:
    done = python(
        "import hooked_vlm\n"
        "hooked_vlm.patching.patch, hooked_vlm.analysis.attention_rows, hooked_vlm.viewer.attention\n"
        "hooked_vlm.lens.logit_lens, hooked_vlm.metrics.log_prob, hooked_vlm.interventions.ZeroHeads\n"
        "assert 'sweep_many' in dir(hooked_vlm) and callable(hooked_vlm.sweep)\n"
        "hooked_vlm.heads"
    )
    assert done.returncode == 1 and "module 'hooked_vlm' has no attribute 'heads'" in done.stderr


@pytest.mark.parametrize("command", [["models"], ["ocr-heads", "score"], ["head-attribution", "all"]])
def test_an_interrupt_while_a_command_imports_is_one_line(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(INTERRUPTING)
    done = python("from hooked_vlm import cli; cli.main()", *command, folder=tmp_path)
    assert done.returncode == 130
    assert done.stderr.strip() == "hooked-vlm: interrupted"
