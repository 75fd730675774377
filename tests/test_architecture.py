"""The architecture: arrows between packages point down, files are short, names are told apart, faces hold."""

import ast
import builtins
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from hooked_vlm import errors

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"hooked_vlm": "hooked_vlm", "converters": "hooked_vlm.converters", "experiments": "hooked_vlm.experiments"}
LAYERS = (
    "cli", "commands", "experiments", "atlas", "viewer", "verify", "features", "steering", "activations", "patching",
    "toys", "lens", "sweeps", "metrics", "analysis", "interventions", "model", "loading", "nn", "data", "inputs",
    "runtime", "converters", "config", "vision_config", "errors", "_lazy",
)  # fmt: skip
"""From the top to the ground."""
UPWARDS = {("hooked_vlm.model.cache", "hooked_vlm.analysis.pictures")}
"""The one import upwards, in the function that draws (`cache.show`); docs/architecture.md names it."""
LONGEST = 400
"""Lines of a file outside the tests."""
MOST_FLAT = 8
"""Modules that lie in hooked_vlm/ itself."""


def modules() -> dict[str, Path]:
    """Every module of the library, by the name it is imported under."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder)
            if inner.parts[0] in ("converters", "experiments"):  # links, in Pythons that follow them
                continue
            parts = [] if path.name == "__init__.py" else [path.stem]
            found[".".join([package, *inner.parts[:-1], *parts])] = path
    return found


MODULES = modules()
PACKAGES = sorted(name for name, path in MODULES.items() if path.name == "__init__.py")


@cache
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


@cache
def guarded(name: str) -> list[ast.If]:
    """A module's `if TYPE_CHECKING:` blocks."""
    ifs = (node for node in ast.walk(trees()[name]) if isinstance(node, ast.If))
    return [node for node in ifs if ast.unparse(node.test) == "TYPE_CHECKING"]


@cache
def face(package: str) -> dict[str, str]:
    """The modules that a package's lazy names come from."""
    return {
        alias.name: node.module
        for block in guarded(package)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def imports(name: str) -> Iterator[str]:
    """Modules of the library that a module imports at run time, wherever in the file; faces are looked through."""
    typing_only = {node for block in guarded(name) for node in ast.walk(block)}
    for node in ast.walk(trees()[name]):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                homes = face(node.module) if node.module in PACKAGES else {}
                yield module if module in MODULES else homes.get(alias.name, node.module)


@cache
def all_imports() -> dict[str, list[str]]:
    return {name: sorted(set(imports(name))) for name in MODULES}


def layer(name: str) -> int:
    """0 at the top. The face of the whole lies over everything."""
    return -1 if name == "hooked_vlm" else LAYERS.index(name.split(".")[1])


def test_arrows_point_down() -> None:
    upwards = {(name, target) for name in MODULES for target in all_imports()[name] if layer(target) < layer(name)}
    assert upwards == UPWARDS


def test_the_import_upwards_waits_for_its_function() -> None:
    for name, target in UPWARDS:
        at_import = [node.module for node in trees()[name].body if isinstance(node, ast.ImportFrom)]
        assert target not in at_import


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(all_imports()).prepare()  # names the circle


def test_converters_know_nothing_of_the_model() -> None:
    known = {target for name in MODULES if name.startswith("hooked_vlm.converters") for target in all_imports()[name]}
    assert {target for target in known if not target.startswith("hooked_vlm.converters")} == {"hooked_vlm.errors"}


def test_few_modules_lie_flat() -> None:
    flat = [path.name for path in (ROOT / "hooked_vlm").glob("*.py")]
    assert len(flat) <= MOST_FLAT, sorted(flat)


def test_no_function_or_class_bears_the_name_of_its_module() -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    twins = [
        name
        for name, tree in trees().items()
        for node in tree.body
        if isinstance(node, kinds) and node.name == name.rpartition(".")[2]
    ]
    assert not twins


def test_every_error_is_in_the_module_of_errors() -> None:
    bases = {name for module in (builtins, errors) for name, value in vars(module).items() if is_exception(value)}
    elsewhere = [
        (name, node.name)
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and name != "hooked_vlm.errors"
        and {ast.unparse(base).rpartition(".")[2] for base in node.bases} & bases
    ]
    assert not elsewhere
    assert all(issubclass(one, errors.HookedVLMError) for one in vars(errors).values() if is_exception(one))


def is_exception(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def test_no_file_is_longer_than_a_sitting() -> None:
    folders = [ROOT / folder for folder in (*FOLDERS, "benchmarks", "tools")]
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in folder.rglob("*.py")
        if path.resolve().is_relative_to(folder)
    }
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_face_names_what_there_is(package: str) -> None:
    module = import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert all(getattr(module, name) is not None for name in module.__all__)
