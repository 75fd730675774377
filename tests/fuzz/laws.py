"""What no input may do: crash with an error that is not ours, hang, take all memory, write elsewhere, run code."""

import faulthandler
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from jaxtyping import TypeCheckError

from hooked_vlm.errors import HookedVLMError

CPU_SECONDS = 20
"""A case that computes for longer hangs."""
WALL_SECONDS = 300
"""A case that waits for longer ends the process, with a traceback."""
MEMORY = 3 * 2**30
"""Bytes of address space a case may take beyond what is there when a campaign begins."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "webbrowser.open",
              "socket.connect", "ctypes.dlopen")  # fmt: skip
_CHANGES = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.symlink": 1, "os.link": 1, "os.chmod": 0,
            "os.truncate": 0}  # fmt: skip


class Broken(AssertionError):
    """A law that did not hold."""


class Hang(BaseException):
    """Raised inside a case that computes for too long; no `except Exception` takes it for an error of a file."""


@dataclass
class Watch:
    """What the running case did that it must not."""

    folder: str = ""
    """Where it may write; empty: no case is running."""
    thread: int = 0
    seen: list[str] = field(default_factory=list)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or threading.get_ident() != self.thread:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and isinstance(flags, int) and flags & _WRITES:
                self._writes(event, path)
        elif event in _CHANGES:
            self._writes(event, arguments[_CHANGES[event]])
        elif event in _FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(self.folder):
            self.seen.append(f"code of the input was run: {arguments[0].co_filename}")

    def _writes(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        where = os.path.abspath(os.fsdecode(path))
        allowed = (self.folder, "/dev/null", "/dev/tty")
        if not where.startswith(allowed) and "__pycache__" not in where:
            self.seen.append(f"{event} {where}")


WATCH = Watch()
_installed: list[bool] = []


def _install() -> None:
    if not _installed:  # an audit hook stays for good
        sys.addaudithook(WATCH.audit)
        _installed.append(True)


def _hang(signum: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {CPU_SECONDS} seconds")


def held(case: Callable[[Path], str], expected: tuple[type[BaseException], ...] = (HookedVLMError,)) -> str:
    """Run a case in a folder of its own; what became of it: its own word, or the name of one of our errors.

    Raises:
        Broken: a law did not hold.
    """
    _install()
    before = signal.signal(signal.SIGVTALRM, _hang)
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="fuzz.", dir=shm) as name:
        # what tempfile or a library writes for itself goes there, too
        WATCH.seen, WATCH.thread = [], threading.get_ident()
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
        WATCH.folder = name
        try:
            return case(Path(name))
        except TypeCheckError:  # under the tests, which execute annotations, before anything of ours runs
            return "wrong type"
        except expected as error:
            message = str(error)
            if not message:
                raise Broken(f"{type(error).__name__} without a message") from error
            return type(error).__name__
        except (Hang, Exception) as error:
            raise Broken(f"{type(error).__name__}: {error!s:.300}") from error
        except BaseException as error:  # a panic of a Rust library
            if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
                raise
            raise Broken(f"{type(error).__name__}: {error!s:.300}") from error
        finally:
            WATCH.folder = ""
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
            if WATCH.seen:
                raise Broken("; ".join(WATCH.seen))


def where(broken: BaseException) -> str:
    """Type of the cause, and the last line of ours it passed."""
    cause = broken.__cause__ or broken
    frames = traceback.extract_tb(cause.__traceback__)
    own = [f for f in frames if any(part in f.filename for part in ("hooked_vlm", "converters/", "experiments/"))]
    own = [f for f in own if "site-packages" not in f.filename]
    at = f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}" if own else "outside"
    kind = type(cause).__name__ if broken.__cause__ else str(broken)[:120]
    return f"{kind} at {at}"


@dataclass
class Figures:
    """What a campaign did."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    broken: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Where: (first message, the case's bytes in hexadecimal)."""
    n_broken: int = 0
    worst: float = 0.0
    """Seconds of the slowest case."""
    worst_case: str = ""

    def run(self, target: Callable[[bytes], str], data: bytes) -> None:
        start = time.process_time()
        faulthandler.dump_traceback_later(WALL_SECONDS, exit=True)
        try:
            self.outcomes[target(data)] += 1
        except Broken as error:
            self.n_broken += 1
            self.broken.setdefault(where(error), (str(error), data.hex()))
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.cases += 1
        seconds = time.process_time() - start
        if seconds > self.worst:
            self.worst, self.worst_case = seconds, data.hex()


def bound_memory() -> None:
    """From here on the process cannot take more than `MEMORY` besides what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
