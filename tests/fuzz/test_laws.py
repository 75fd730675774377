"""Hostile input of every kind keeps to the laws: a few cases each here, many with --run-slow and in campaigns."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import laws
from fuzz.targets import TARGETS, prepare

CAMPAIGN = Path(__file__).parent / "campaign.py"
UNHURRIED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    prepare()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # libraries warn of what they are given; errors are what matters
@pytest.mark.parametrize("name", TARGETS)
def test_a_few_cases_of_every_kind(name: str) -> None:
    @settings(max_examples=8, suppress_health_check=UNHURRIED)
    @given(st.binary(min_size=8, max_size=400))
    def holds(data: bytes) -> None:
        TARGETS[name](data)

    holds()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_many_cases_of_every_kind(name: str) -> None:
    """The same cases at every run; `campaign.py` is what looks for new ones."""

    @settings(max_examples=400, suppress_health_check=UNHURRIED, derandomize=True)
    @given(st.binary(min_size=8, max_size=1000))
    def holds(data: bytes) -> None:
        TARGETS[name](data)

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["settings", "tensors", "images"])
def test_a_campaign_guided_by_coverage(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install 'hooked-vlm[fuzz]' (CPython 3.11 to 3.13 on Linux)")
    arguments = [name, "--seconds", "30", "--engine", "atheris", "--out", str(tmp_path)]
    subprocess.run([sys.executable, str(CAMPAIGN), *arguments], check=True, timeout=600, cwd=CAMPAIGN.parents[2])
    record = json.loads((tmp_path / f"{name}-atheris-0.json").read_text())
    assert record["cases"] > 10 and not record["broken"], record["broken"]


# ---------------------------------------------------------------- the laws themselves can be broken


def breaks(case: object) -> str:
    with pytest.raises(laws.Broken) as broken:
        laws.held(case)  # pyright: ignore[reportArgumentType]
    return str(broken.value)


def test_what_breaks_a_law_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(folder: Path) -> str:
        raise KeyError("x")

    def elsewhere(folder: Path) -> str:
        (tmp_path / "elsewhere").write_text("x")
        return "written"

    def planted(folder: Path) -> str:
        (folder / "x.py").write_text("1")
        exec(compile("1", str(folder / "x.py"), "exec"))
        return "run"

    def program(folder: Path) -> str:
        subprocess.run(["true"], check=True)
        return "run"

    def endless(folder: Path) -> str:
        while True:
            pass

    monkeypatch.setattr(laws, "CPU_SECONDS", 0.2)
    assert "KeyError" in breaks(crash)
    assert "elsewhere" in breaks(elsewhere)
    assert "code of the input" in breaks(planted)
    assert "subprocess" in breaks(program)
    assert "Hang" in breaks(endless)
    assert laws.held(lambda folder: str((folder / "own").write_text("x"))) == "1"
