"""Work in tasks, results kept as they are made, atomic files, what a result records of itself."""

from typing import TYPE_CHECKING

from hooked_vlm._lazy import lazy_names

if TYPE_CHECKING:
    from hooked_vlm.runtime.digests import digest
    from hooked_vlm.runtime.progress import Step, listening
    from hooked_vlm.runtime.provenance import code_hash
    from hooked_vlm.runtime.ray_workers import OnRay
    from hooked_vlm.runtime.store import ResultStore
    from hooked_vlm.runtime.tasks import InProcess, SharedSetup, Task, Workers, WorkerState

__all__ = [
    "InProcess", "OnRay", "ResultStore", "SharedSetup", "Step", "Task", "WorkerState", "Workers",
    "code_hash", "digest", "listening",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__)
