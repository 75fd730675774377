"""What an installation puts where: one importable name, whole, whatever folder the user works in."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "hooked_vlm": "hooked_vlm",
    "converters": "hooked_vlm/converters",
    "experiments": "hooked_vlm/experiments",
}
LINKS = {ROOT / "hooked_vlm" / "converters", ROOT / "hooked_vlm" / "experiments"}

IMPORT_ALL = """
import importlib, pkgutil, sys
import converters, experiments
assert converters.OWNER == experiments.OWNER == "the user"
import hooked_vlm
def fail(name): raise
for module in pkgutil.walk_packages(hooked_vlm.__path__, "hooked_vlm.", onerror=fail):
    if not module.name.endswith("__main__"):
        print(module.name, importlib.import_module(module.name).__file__)
assert sys.modules["converters"] is converters and sys.modules["experiments"] is experiments
"""


def command(*arguments: object, cwd: Path) -> str:
    """The output of one command, run without our Python variables; a failure shows all it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(argument) for argument in arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def source_files() -> dict[str, Path]:
    """Every file of the three folders, by the name it has once installed."""
    files = {}
    for folder, installed in FOLDERS.items():
        for parent, subfolders, names in os.walk(ROOT / folder):
            subfolders[:] = [s for s in subfolders if s != "__pycache__" and Path(parent, s) not in LINKS]
            for path in (Path(parent, name) for name in names):
                files[f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return files


def copied_sources(to: Path) -> Path:
    """A checkout to build in, so that nothing is left in the real one and nothing left there is picked up."""
    to.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, to)
    return to


def fresh_environment(folder: Path) -> Path:
    """A virtual environment that sees what this one has installed, save for hooked_vlm itself."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = Path(command(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A folder named in a .pth file is searched; its own .pth files (an editable install of ours) are not run.
    (site / "tests_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *what: object, cwd: Path) -> None:
    command(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index",
        "--no-build-isolation", "--ignore-installed", *what, cwd=cwd,
    )  # fmt: skip


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A research repository with a `converters` and an `experiments` of its own."""
    folder = tmp_path_factory.mktemp("research")
    for name in ("converters", "experiments"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text('OWNER = "the user"\n')
    (folder / "import_all.py").write_text(IMPORT_ALL)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, which has no links: as where a checkout cannot have any."""
    sources = copied_sources(tmp_path_factory.mktemp("build") / "sources")
    command(sys.executable, "-m", "build", "--no-isolation", "--outdir", sources / "dist", cwd=sources)
    (built,) = (sources / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = fresh_environment(tmp_path_factory.mktemp("wheel") / "venv")
    install(python, wheel, cwd=wheel.parent)
    return python


def test_the_wheel_adds_one_name_and_holds_every_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"hooked_vlm"}
    wanted = {
        name
        for name in source_files()
        if name.endswith((".py", ".json", ".csv", ".jinja", ".css", ".js", "py.typed"))
        or name.startswith("hooked_vlm/toy_models/")
    }
    assert not wanted - names, "left out of the wheel: is an __init__.py missing beside it?"
    assert not {name for name in names if name.startswith("hooked_vlm/")} - source_files().keys()


def test_a_wheel_built_in_the_checkout_is_the_same(wheel: Path, tmp_path: Path) -> None:
    sources = copied_sources(tmp_path / "sources")
    command(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, cwd=sources)
    assert sorted(zipfile.ZipFile(tmp_path / wheel.name).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_every_module_imports_beside_the_users_own_packages(installed: Path, users_folder: Path) -> None:
    lines = command(installed, "import_all.py", cwd=users_folder).splitlines()
    imported = dict(line.split(" ", 1) for line in lines)
    modules = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in source_files()
        if name.endswith(".py") and not name.endswith("__main__.py")
    }
    assert modules - imported.keys() == {"hooked_vlm"}
    outside = {path for path in imported.values() if not Path(path).is_relative_to(installed.parent.parent)}
    assert not outside


@pytest.mark.slow
def test_the_command_is_installed(installed: Path, users_folder: Path) -> None:
    assert "ocr-heads" in command(installed.parent / "hooked-vlm", "--help", cwd=users_folder)


@pytest.mark.slow
def test_an_editable_install_follows_the_checkout(tmp_path: Path, users_folder: Path) -> None:
    sources = copied_sources(tmp_path / "sources")
    python = fresh_environment(tmp_path / "venv")
    install(python, "--editable", sources, cwd=sources)
    (sources / "experiments" / "added").mkdir()
    for module in ("converters/added.py", "experiments/added/__init__.py", "experiments/added/later.py"):
        (sources / module).write_text("WHERE = __file__\n")
    (users_folder / "import_added.py").write_text(
        "import converters, experiments\n"
        "import hooked_vlm.converters.added as one, hooked_vlm.experiments.added.later as two\n"
        "assert converters.OWNER == experiments.OWNER == 'the user'\n"
        "print(one.WHERE, two.WHERE, sep='\\n')\n"
    )
    found = command(python, "import_added.py", cwd=users_folder).splitlines()
    added = [sources / "converters" / "added.py", sources / "experiments" / "added" / "later.py"]
    assert [Path(path).resolve() for path in found] == added
    pyright_resolves_added(sources)


def pyright_resolves_added(sources: Path) -> None:
    (sources / "tests").mkdir()
    (sources / "tests" / "names.py").write_text(
        "from hooked_vlm.converters.added import WHERE as one\n"
        "from hooked_vlm.experiments.added.later import WHERE as two\n"
        "reveal_type((one, two))\n"
    )
    pyright = Path(sys.executable).with_name("pyright")
    report = command(pyright, "--pythonpath", sys.executable, "tests/names.py", cwd=sources)
    assert 'Type of "(one, two)" is "tuple[str, str]"' in report


def test_everything_we_ask_for_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    assert lines[0] == "torch==2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    asked = [line for line in asked if not line.startswith("hooked-vlm[")]  # our own other extras
    assert not {distribution(line) for line in asked} - {distribution(line) for line in lines}


def distribution(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")
