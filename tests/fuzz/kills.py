"""`kill -9` at random moments: `python tests/fuzz/kills.py --kills 50 --seed 0 [NAME ...]`.

Every run is a process of its own (forked, so that imports are done before), told apart by events of the file system in
its folder: it is killed a moment after a random one of them, so that kills fall while files are written. Half of them
are killed a second time while they resume. What is visible at that moment must be whole, and the resumed run must end
with the same bytes as one that was left alone.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fuzz.seeds import models
from fuzz.work import WORK, differences, done

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


@dataclass
class Kills:
    """What became of one kind of work."""

    kills: int = 0
    mid_write: int = 0
    """Kills that left a file or folder that was being written."""
    finished_before: int = 0
    """Runs that were through before their moment came."""
    twice: int = 0
    faults: list[str] = field(default_factory=list)


def run(name: str, folder: Path, stop_at: int = 0, delay: float = 0.0) -> tuple[bool, int]:
    """Do some work in a child whose folder is `folder`/out; kill it `delay` seconds after its `stop_at`-th event.

    Returns:
        Whether it was killed, and how many events of the file system it told of.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            os.chdir(folder)
            out = str(folder / "out")

            def told(event: str, arguments: tuple) -> None:
                if event in EVENTS and arguments and str(arguments[0]).startswith(("out", out)):
                    os.write(write, b".")

            sys.addaudithook(told)
            done(name, Path("out"))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    seen = 0
    while piece := os.read(read, 1 if stop_at else 4096):
        seen += len(piece)
        if seen == stop_at:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{name} failed in {folder}")
    return killed, seen


def killed_and_resumed(name: str, n: int, rng: random.Random) -> Kills:
    """Kill `n` runs of one kind of work, and compare what they leave and what they end with."""
    found = Kills()
    root = Path(tempfile.mkdtemp(prefix="kills."))
    try:
        (root / "whole").mkdir()
        _, events = run(name, root / "whole")
        whole = root / "whole" / "out"
        while found.kills < n:
            folder = root / "killed"
            folder.mkdir()
            moment, wait = rng.randint(1, events), rng.choice((0.0, rng.random() * 0.002, rng.random() * 0.05))
            killed, _ = run(name, folder, moment, wait)
            out = folder / "out"
            where = f"killed {wait * 1000:.1f} ms after event {moment} of {events}"
            if killed:
                found.kills += 1
                found.mid_write += any(path.name.startswith(".") for path in out.rglob("*"))
                found.faults += [f"{where}: {wrong}" for wrong in differences(whole, out, complete=False)]
                if rng.random() < 0.5:
                    found.twice += run(name, folder, rng.randint(1, events), wait)[0]
            else:
                found.finished_before += 1
            run(name, folder)
            found.faults += [f"{where}, resumed: {wrong}" for wrong in differences(whole, out, complete=True)]
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(WORK))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    models()  # loaded once, for all
    for name in asked.names:
        start = time.monotonic()
        found = killed_and_resumed(name, asked.kills, random.Random(f"{asked.seed} {name}"))
        print(
            f"{name}: {found.kills} kills ({found.mid_write} in the midst of writing, {found.twice} killed again while "
            f"resuming; {found.finished_before} runs were through before), {len(found.faults)} faults, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
        for fault in found.faults[:20]:
            print(f"  {fault}")


if __name__ == "__main__":
    main()
