"""Units of work on a local Ray cluster of two workers: the same tables, whoever is killed meanwhile."""

import json
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from PIL import Image

from hooked_vlm import CheckpointError, HookedVLM, InputError, SweepCase, sweep_many
from hooked_vlm.errors import StudyError, WorkerError
from hooked_vlm.experiments.head_attribution import All
from hooked_vlm.experiments.head_attribution import run as run_head_attribution
from hooked_vlm.experiments.ocr_heads import MaskConfig, ScoreConfig
from hooked_vlm.experiments.ocr_heads import run as run_ocr_heads
from hooked_vlm.experiments.ocr_heads.examples import Example
from hooked_vlm.interventions import AddVector, ReplaceImageKV, ZeroHeads
from hooked_vlm.metrics import log_prob
from hooked_vlm.runtime.ray_cluster import Share, connect, share_of
from hooked_vlm.runtime.ray_workers import OnRay, Replica
from hooked_vlm.runtime.store import ResultStore
from hooked_vlm.runtime.tasks import Task
from hooked_vlm.toys.pages import make_page

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")


# ---------------------------------------------------------------- without a cluster


def cluster(*nodes: dict[str, int], dead: int = 0) -> Any:
    """What is asked of `ray` about its machines."""
    listed = [{"Alive": i >= dead, "Resources": node} for i, node in enumerate(nodes)]
    return SimpleNamespace(nodes=lambda: listed)


def test_cores_are_shared_out_so_that_every_worker_finds_its_place() -> None:
    assert share_of(cluster({"CPU": 2}), 2, False) == Share(1, 0)
    assert share_of(cluster({"CPU": 3}, {"CPU": 5}), 2, False) == Share(3, 0)
    assert share_of(cluster({"CPU": 3}, {"CPU": 5}), 1, False) == Share(5, 0)
    assert share_of(cluster({"CPU": 4}, {"CPU": 4}), 3, False) == Share(2, 0)
    assert share_of(cluster({"CPU": 8}, {"CPU": 2}, dead=1), 2, False) == Share(1, 0)
    assert share_of(cluster({"CPU": 16, "GPU": 4}, {"CPU": 64}), 4, True) == Share(4, 1)
    with pytest.raises(WorkerError, match=r"3.*core.*2"):
        share_of(cluster({"CPU": 2}), 3, False)
    with pytest.raises(WorkerError, match=r"5.*GPU.*4"):
        share_of(cluster({"CPU": 16, "GPU": 4}), 5, True)


def test_without_ray_the_error_says_what_to_install(model: HookedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkerError, match=r"hooked-vlm\[ray\]"):
        connect("local")
    with pytest.raises(WorkerError, match=r"workers.*0"):
        OnRay(model, n=0)


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        ([], None),
        (["--ray"], "local"),
        (["--ray", "auto"], "auto"),
        (["--ray", "--seed", "3"], "local"),
        (["--ray", "10.0.0.5:6379", "--seed", "3"], "10.0.0.5:6379"),
    ],
)
@pytest.mark.parametrize("study", [ScoreConfig, All])
def test_ray_may_be_given_an_address(study: Any, arguments: list[str], address: str | None) -> None:
    config = tyro.cli(study, args=arguments)
    assert config.ray == address and config.seed == (3 if "--seed" in arguments else 0)
    config.check()


@pytest.mark.parametrize("study", [ScoreConfig, All])
def test_settings_of_workers_that_mean_nothing_are_refused(study: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StudyError, match=r"--workers.*0"):
        study(ray="auto", workers=0).check()
    with pytest.raises(StudyError, match="--ray"):
        study(workers=2).check()
    with pytest.raises(SystemExit):
        tyro.cli(study, args=["--ray", "one", "two"])
    assert "one two" in " ".join(capsys.readouterr().err.split())


def test_an_example_that_is_sent_carries_its_pictures(tmp_path: Path) -> None:
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "page.png")
    example = Example("What?", ("that",), (tmp_path / "page.png",))
    sent = pickle.dumps(example)
    (tmp_path / "page.png").unlink()
    (picture,) = pickle.loads(sent).images
    assert np.asarray(picture).ravel().tolist() == list(range(48)) and example.images == (tmp_path / "page.png",)


def test_nobody_is_asked_for_nothing(model: HookedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hooked_vlm.runtime.ray_workers.connect", lambda address: pytest.fail("connected"))
    with OnRay(model) as workers:
        assert workers.tables([], "nothing", quiet=True) == []


def test_a_spread_or_quantised_model_has_no_replicas() -> None:
    with pytest.raises(WorkerError, match="--device auto"):
        OnRay(HookedVLM.from_pretrained("toy-qwen2-vl", device_map={"": "cpu"}))
    with pytest.raises(WorkerError, match="quantised"):
        OnRay(HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu", quantize="int8"))


def test_a_model_that_workers_do_not_load_as_it_is_is_refused(
    model: HookedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")
    with torch.no_grad():
        changed.embed.weight[0, 0] += 1
    told = {
        "same": model.identity(),
        "missing": Replica().load(HookedVLM, "no-such", "cpu", torch.float32, torch.get_num_threads()),
    }
    told["other software"] = model.identity() | {"torch": "1.0"}
    monkeypatch.setattr(OnRay, "_get", lambda self, answer: told[answer])

    def welcome(model: HookedVLM, answer: str) -> list[Any]:
        workers = OnRay(model)
        workers._loading[answer] = "the actor"
        workers._admit(answer)
        return workers._idle

    assert welcome(model, "same") == ["the actor"]
    with pytest.raises(WorkerError, match="weights"):
        welcome(changed, "same")
    with pytest.raises(WorkerError, match=r"torch.*1\.0.*2"):
        welcome(model, "other software")
    with pytest.raises(CheckpointError, match="no-such"):
        welcome(model, "missing")


# ---------------------------------------------------------------- on a cluster

LOOPBACK = ("127.0.0.1", "::1", "localhost", "0.0.0.0")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:  # instead of the one that forbids connections altogether
    """Ray's processes talk to each other, on this machine alone."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


@pytest.fixture(scope="module")
def workers(model: HookedVLM) -> Iterator[OnRay]:
    """Two, hired when they are first asked; this process then computes with as many threads as one of them."""
    with pytest.MonkeyPatch.context() as patch, OnRay(model, n=2) as found:
        # the work functions below are found by workers too
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
        threads = torch.get_num_threads()
        torch.set_num_threads(found.share.n_threads)
        yield found
        torch.set_num_threads(threads)


def numbers(model: Any, number: int) -> pd.DataFrame:
    return pd.DataFrame({"number": [number], "square": [number**2], "process": [os.getpid()]})


def once_deadly(model: Any, number: int, sign: Path) -> pd.DataFrame:
    """The first worker that does this one is killed at it."""
    if not sign.exists():
        sign.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return numbers(model, number)


def always_deadly(model: Any) -> pd.DataFrame:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def mistaken(model: Any, kind: str) -> pd.DataFrame:
    raise {"ours": InputError, "the study's": StudyError, "python's": ZeroDivisionError}[kind](f"{kind} own words")


def slow(model: Any, number: int) -> pd.DataFrame:
    time.sleep(0.5)
    return numbers(model, number)


def cases(model: HookedVLM) -> list[SweepCase]:
    rng = np.random.default_rng(7)
    heads = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    found = []
    for i in range(3):
        page = make_page(rng, n_lines=3)
        answer = model.to_tokens(page.lines[1].value)[0, 0].item()
        steered = [AddVector("blocks.1.hook_resid_post", torch.full((model.cfg.d_model,), 0.1 * n)) for n in range(4)]
        runs = [*(ReplaceImageKV((head,)) for head in heads), *steered, *(ZeroHeads((head,)) for head in heads)]
        inputs = model.to_inputs(page.question(1), images=page.image)
        found.append(SweepCase(f"page {i}", inputs, runs, log_prob(answer)))
    return found


def numbers_in(tables: Any, column: str = "square") -> list[int]:
    return [int(table[column][0]) for table in tables]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.parquet"))


@pytest.mark.slow
def test_a_sweep_is_the_same_table_bit_for_bit(model: HookedVLM, workers: OnRay, tmp_path: Path) -> None:
    here: Any = sweep_many(model, cases(model), tmp_path / "here", runs_per_block=7)
    there = sweep_many(model, cases(model), tmp_path / "there", runs_per_block=7, workers=workers)
    pd.testing.assert_frame_equal(there, here, check_exact=True)
    assert len(here) == 3 * 36 and here["effect"].nunique() > 90
    assert names(tmp_path / "here") == names(tmp_path / "there") and len(names(tmp_path / "here")) == 18
    for name in names(tmp_path / "here"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    before = workers.size
    sweep_many(model, cases(model), tmp_path / "here", runs_per_block=7, workers=workers)
    assert workers.size == before  # all was there


@pytest.mark.slow
def test_a_worker_killed_at_its_work_is_replaced_and_its_unit_done_again(
    model: HookedVLM, workers: OnRay, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = workers.n_lost
    parts = ResultStore(tmp_path / "parts")
    units = [
        Task(parts, {"number": i}, once_deadly if i == 3 else numbers, (i, tmp_path / "sign") if i == 3 else (i,))
        for i in range(10)
    ]
    tables = workers.tables(units, "numbers", quiet=True)
    assert numbers_in(tables) == [i**2 for i in range(10)]
    assert workers.n_lost == lost + 1 and (tmp_path / "sign").exists()
    assert len(names(parts.folder)) == 10
    assert os.getpid() not in numbers_in(tables, "process")
    assert 'once_deadly of {"number": 3}' in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_whose_worker_is_killed_from_outside_is_the_same_table(
    model: HookedVLM, workers: OnRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = sweep_many(model, cases(model), tmp_path / "here", runs_per_block=7)
    (victim,) = numbers_in(workers.tables([Task(ResultStore(tmp_path), {"who": 1}, numbers, (1,))], "who"), "process")
    lost, put = workers.n_lost, ResultStore.put
    kept: list[str] = []

    def put_and_kill(self: ResultStore, key: Any, frame: pd.DataFrame) -> None:
        put(self, key, frame)
        kept.append(json.dumps(key, sort_keys=True))
        if len(kept) == 5:
            os.kill(victim, signal.SIGKILL)

    monkeypatch.setattr(ResultStore, "put", put_and_kill)
    there = sweep_many(model, cases(model), tmp_path / "there", runs_per_block=7, workers=workers)
    pd.testing.assert_frame_equal(there, here, check_exact=True)
    assert workers.n_lost == lost + 1
    assert len(kept) == len(set(kept)) == 18 and len(names(tmp_path / "there")) == 18


@pytest.mark.slow
def test_a_unit_that_always_kills_its_worker_ends_in_one_clear_error(workers: OnRay, tmp_path: Path) -> None:
    units = [Task(ResultStore(tmp_path), {"unit": "bad"}, always_deadly)]
    with pytest.raises(WorkerError, match=r'3.*always_deadly.*"bad"'):
        workers.tables(units, "deadly", quiet=True)
    assert names(tmp_path) == []
    assert len(workers.tables([Task(ResultStore(tmp_path), {"n": 1}, numbers, (1,))], "numbers", quiet=True)) == 1


@pytest.mark.slow
def test_errors_of_the_work_arrive_as_they_are(workers: OnRay, tmp_path: Path) -> None:
    for kind, error in (("ours", InputError), ("the study's", StudyError), ("python's", ZeroDivisionError)):
        with pytest.raises(error) as raised:
            workers.tables([Task(ResultStore(tmp_path), {"kind": kind}, mistaken, (kind,))], "mistakes", quiet=True)
        assert str(raised.value) == f"{kind} own words"
        assert "in mistaken" in raised.value.__notes__[0]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(
    workers: OnRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [Task(ResultStore(tmp_path), {"number": i}, slow, (i,)) for i in range(6)]
    put = ResultStore.put

    def interrupted(self: ResultStore, key: Any, frame: pd.DataFrame) -> None:
        put(self, key, frame)
        if len(names(tmp_path)) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResultStore, "put", interrupted)
        workers.tables(units, "numbers", quiet=True)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    assert len(before) == 3
    tables = workers.tables(units, "numbers", quiet=True)
    assert numbers_in(tables) == [i**2 for i in range(6)]
    assert (
        len(names(tmp_path)) == 6
        and before.items() <= {n: (tmp_path / n).read_bytes() for n in names(tmp_path)}.items()
    )


STUDIES: dict[str, tuple[Any, Any]] = {
    "ocr-heads score": (run_ocr_heads, ScoreConfig(samples=4, tokens_per_batch=200, max_new_tokens=6)),
    "ocr-heads mask": (
        run_ocr_heads,
        MaskConfig(samples=3, task_samples=2, random_draws=1, tokens_per_batch=200, max_new_tokens=6, tasks=("page",)),
    ),
    "head-attribution all": (
        run_head_attribution,
        All(samples=2, masks=30, token_masks=30, bootstrap=5, random_rankings=1, baseline="dataset"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_a_study_comes_to_the_same_tables(study: str, model: HookedVLM, workers: OnRay, tmp_path: Path) -> None:
    assert workers.share.n_threads == torch.get_num_threads()
    workers.rest()  # the study hires its own
    run, config = STUDIES[study]
    config = replace(config, quiet=True, device="cpu")
    run(replace(config, out=tmp_path / "here"), model)
    run(replace(config, out=tmp_path / "there", ray="local", workers=2), model)
    here, there = (
        {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*.parquet")}
        for name in ("here", "there")
    )
    assert here == there and any("parts" in name for name in here) and any("tables" in name for name in here)
    record, other = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("here", "there"))
    assert "ray" not in record["config"] and "workers" not in record["config"]
    for told in (record, other):
        told["config"].pop("out", None)
    assert record == other
