"""Rules for every test: no network, a fixed seed, a share of the cores, costly kinds and further cases on request."""

import gc
import os
import socket
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before anything else
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import jaxtyping
import pytest
import torch
from executed_shapes import executed
from family_names import ONE_OF_EACH_KIND, OTHERS
from hypothesis import settings

jaxtyping.jaxtyped = executed  # where the hook of --jaxtyping-packages finds it, before the library is imported

ON_REQUEST = {
    "slow": ("--run-slow", "takes long"),
    "gpu": ("--run-gpu", "needs an accelerator"),
    "real_weights": ("--run-real-weights", "needs a published checkpoint on this machine"),
}

FEW_CASES = "of each law the fewest cases in which every value of every parameter occurs"

# The same examples on every run, and no time limit on each: a loaded machine must not fail a property.
settings.register_profile("full", derandomize=True, deadline=None)
settings.register_profile("few", settings.get_profile("full"), max_examples=20)

cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, cores // workers))


def pytest_addoption(parser: pytest.Parser) -> None:
    for marker, (option, reason) in ON_REQUEST.items():
        parser.addoption(option, action="store_true", help=f"also run tests marked {marker}: {reason}")
    parser.addoption("--full", action="store_true", help=f"every case: without it, {FEW_CASES}")
    parser.addoption("--further", action="store_true", help="the cases that a plain run leaves out, and every property")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("full" if _many_cases(config) else "few")


def _many_cases(config: pytest.Config) -> bool:
    return bool(config.getoption("--full") or config.getoption("--further"))


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("--further"):
        return "cases that a plain run leaves out, and every property on more examples"
    return "every case of every law" if config.getoption("--full") else f"{FEW_CASES}; run with --full for all"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Refuse a name that differs from process to process: workers must collect the same tests."""
    if " at 0x" in item.nodeid:
        raise pytest.UsageError(f"{item.nodeid} has an address in its name: give its parameters ids")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """No search for garbage, half the time of collection, nor later among the modules and tests, which stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)  # after -k and -m, so that the cases kept are among those asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, (option, reason) in ON_REQUEST.items():
        if config.getoption(option):
            continue
        skip = pytest.mark.skip(reason=f"{marker}: {reason}; run with {option}")
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(skip)
    if not config.getoption("--full"):
        further = set(further_cases(items))
        if config.getoption("--further"):
            left_out = {item for item in items if item not in further and not _is_property(item)}
        else:
            left_out = further
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _is_property(item: pytest.Item) -> bool:
    """Whether Hypothesis draws the examples of a test: fewer in a plain run."""
    return getattr(getattr(item, "obj", None), "is_hypothesis_test", False)


def further_cases(items: list[pytest.Item]) -> list[pytest.Item]:
    """Cases that a run without --full leaves out: marked `full`, or each parameter value occurs in a case kept.

    Cases that are skipped do not stand for others.
    """
    laws: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("skip"):
            laws[item.nodeid.partition("[")[0]].append(item)
    return [case for cases in laws.values() for case in further_of(cases)]


def further_of(cases: list[pytest.Item]) -> list[pytest.Item]:
    """All but the cases chosen, each time the one with most parameter values that none chosen has."""
    values = {case: _values(case) for case in cases if not case.get_closest_marker("full")}
    chosen, missing = [], set().union(*values.values())
    while missing:
        chosen.append(max(values, key=lambda case: len(values[case] & missing)))
        missing -= values[chosen[-1]]
    return [case for case in cases if case not in chosen]


def _values(case: pytest.Item) -> set[tuple[int, str]]:
    """(which `parametrize`, id of its row) of a case; the test itself where it has no parameters."""
    callspec = getattr(case, "callspec", None)
    return set(enumerate(callspec._idlist)) if callspec else {(0, case.name)}


@pytest.fixture(params=[*ONE_OF_EACH_KIND, *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)])
def family(request: pytest.FixtureRequest) -> str:
    """The families, one of each kind in a plain run."""
    return request.param


@pytest.fixture(autouse=True)
def shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Execute shape annotations, which takes a quarter of a tiny model's pass: not where they only repeat."""
    repeats = request.node.get_closest_marker("repeats_shapes")
    off = bool(repeats) and not _many_cases(request.config)
    jaxtyping.config.update("jaxtyping_disable", off)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """`torch.manual_seed` also keeps a stack trace for a device that may come: two milliseconds of each test."""
    (torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed)(0)


@pytest.fixture
def sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of studies as sketches: without axes and fonts, neither arranged nor fine; all of it in the SVG alone."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    save = Figure.savefig

    def sketch(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figure.set_layout_engine("none")
        for axes in figure.axes:
            axes.set_axis_off()
        for shown in (*figure.axes, *figure.legends, *figure.texts):
            shown.set_visible(kwargs.get("format") == "svg")
        with rc_context({"pdf.use14corefonts": True}):
            save(figure, *args, **{**kwargs, "dpi": 20})

    monkeypatch.setattr(Figure, "savefig", sketch)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails at once and by name, with or without a connection."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
