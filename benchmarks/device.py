"""One prepared run on one GPU within eight minutes: random weights of 2B and 7B shape in bfloat16.

python benchmarks/device.py [--minutes 8] [--out FOLDER]  # on a GPU
python benchmarks/device.py --tiny  # from end to end on any machine: what it measures there says nothing of a GPU

Tests marked gpu; forward, hooks, run_with_cache, sweep, generation and memory beside `transformers` (sdpa, and flash
where flash-attn is installed); the host's share of a forward. Writes JSON and a table for docs/benchmarks.md. What does
not fit into the time or into memory is skipped, and named in both.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from device_sections import SECTIONS, Bench
from interleaved import RESULTS, show
from models import shape_of_2b, shape_of_7b, tiny_model

from hooked_vlm.analysis.text_tables import markdown_table

ROOT = Path(__file__).parents[1]
FEWEST, MOST = 3, 9
"""Rounds of a table."""
SHORTEST = 10.0
"""Seconds left without which nothing is begun."""
TESTS_SECONDS = 90
"""Longest time for the tests."""


@dataclass(frozen=True)
class Shape:
    """A model of the run."""

    name: str
    make: Callable[[str, torch.dtype], Any]
    gigabytes: float
    """Free memory that it needs: weights twice (both libraries may hold their own), and activations."""


GPU = (Shape("2B", shape_of_2b, 12), Shape("7B", shape_of_7b, 40))
TINY = (Shape("tiny", tiny_model, 0),)


@dataclass
class Run:
    """Tables, and what was skipped, of a run with a deadline."""

    device: str
    dtype: torch.dtype
    deadline: float
    """Of `time.monotonic`."""
    most: int = MOST
    """Rounds of a table."""
    tables: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    tests: str = ""

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def skip(self, what: str, why: str) -> None:
        self.skipped[what] = why
        print(f"skipped: {what}: {why}", flush=True)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A section that may not fit into memory."""
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.skip(what, "out of memory")

    def section(self, what: str, seconds: float, work: Callable[[int], dict[str, Any]]) -> None:
        """Run a section if there is time for its fewest rounds.

        Args:
            seconds: how long one round takes, as a first call of every method did.
            work: takes the number of rounds.
        """
        share = min(self.left / 3, 45.0)  # no section takes what all others need
        rounds = min(self.most, int(share / max(seconds, 1e-6)))
        if rounds < FEWEST:
            self.skip(what, f"{FEWEST} rounds of {seconds:.1f} s do not fit into {self.left:.0f} s left")
            return
        self.tables[what] = work(rounds)


def run_tests(run: Run) -> None:
    """The tests marked gpu, in a process of their own."""
    if not run.device.startswith("cuda"):
        run.skip("tests marked gpu", "there is no GPU")
        return
    limit = min(TESTS_SECONDS, run.left / 3)
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    call = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "gpu", "--run-gpu"]
    try:
        done = subprocess.run([*call, *files], cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        run.skip("tests marked gpu", f"they take longer than {limit:.0f} s")
        return
    run.tests = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    print(f"tests marked gpu: {run.tests}", flush=True)


@torch.no_grad()
def run_shape(run: Run, shape: Shape) -> None:
    """Every section on one model."""
    if run.device.startswith("cuda") and (free := torch.cuda.mem_get_info()[0] / 1e9) < shape.gigabytes:
        run.skip(shape.name, f"{shape.gigabytes:g} GB are needed, {free:.0f} GB are free")
        return
    if run.left < SHORTEST:
        run.skip(shape.name, f"{max(0, run.left):.0f} s are left")
        return
    bench = Bench.of(shape.make(run.device, run.dtype), run.device)
    for note, why in bench.lacking.items():
        run.skip(f"{shape.name}: {note}", why)
    for title, section in SECTIONS.items():
        what = f"{shape.name}: {title}"
        if run.left < SHORTEST:
            run.skip(what, f"{max(0, run.left):.0f} s are left")
            continue
        with run.attempt(what):
            prepared = section(bench)
            run.section(what, prepared.first_seconds(), prepared.measured)
            if what in run.tables:
                show(what, prepared.timings)


def measured_on(run: Run) -> dict[str, Any]:
    cuda = run.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "driver": torch.version.cuda if cuda else None,
        "torch": torch.__version__,
        "dtype": str(run.dtype).removeprefix("torch."),
    }


def table(found: Mapping[str, Any]) -> str:
    """Markdown: one row for each method, then what was skipped."""
    rows = []
    for what, own in found["tables"].items():
        for method, timing in own.get("methods", {}).items():
            low, high = timing["quartiles"]
            rows.append(
                [
                    what, method, f"{1000 * timing['seconds']:.1f}", f"{timing['ratio']:.2f}x",
                    f"{low:.2f} to {high:.2f}", f"{timing['extra_bytes'] / 2**20:.0f}",
                ]
            )  # fmt: skip
        rows += [[what, name, f"{value:.3g}", "", "", ""] for name, value in own.get("numbers", {}).items()]
    on = found["measured_on"]
    lines = [f"{on['device']}, {on['dtype']}, PyTorch {on['torch']}, {found['seconds']:.0f} s in all.", ""]
    if on["device"] == "CPU":
        lines[:1] = ["Measured on a CPU, to see that the run works: these are no figures of a GPU.", "", lines[0]]
    header = ["work", "method", "ms, or the number itself", "ratio", "quartiles", "MiB beyond weights"]
    lines += [markdown_table(header, rows)]
    lines += [f"- tests marked gpu: {found['tests']}"] if found["tests"] else []
    lines += [f"- skipped: {what} ({why})" for what, why in found["skipped"].items()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> Path:
    """Run everything; the JSON file, beside which the table lies."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in float32, on any device")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if not (given.tiny or given.device.startswith("cuda")):
        parser.error("there is no GPU here: --tiny runs everything on a tiny model")
    start = time.monotonic()
    dtype = torch.float32 if given.tiny else torch.bfloat16
    run = Run(given.device, dtype, start + 60 * given.minutes, FEWEST if given.tiny else MOST)
    run_tests(run)
    for shape in TINY if given.tiny else GPU:
        with run.attempt(shape.name):
            run_shape(run, shape)
        if given.device.startswith("cuda"):
            torch.cuda.empty_cache()  # of the model that is gone now
    seconds = time.monotonic() - start
    found = {"measured_on": measured_on(run), "seconds": seconds, "tests": run.tests, "skipped": run.skipped}
    found["tables"] = run.tables
    given.out.mkdir(parents=True, exist_ok=True)
    name = f"device-{run.device.partition(':')[0]}-{'tiny' if given.tiny else 'bfloat16'}"
    path = given.out / f"{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(found))
    print(f"written to {path} and {path.with_suffix('.md').name} after {seconds:.0f} s")
    return path


if __name__ == "__main__":
    main()
