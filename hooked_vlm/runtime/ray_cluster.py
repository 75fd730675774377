"""Connection to a Ray cluster, and the resources of each worker."""

import logging
import os
from dataclasses import dataclass
from typing import Any

from hooked_vlm.errors import WorkerError
from hooked_vlm.runtime.files import why


@dataclass(frozen=True)
class Share:
    """Resources that one worker reserves."""

    n_cpus: int
    n_gpus: int

    @property
    def n_threads(self) -> int:
        return max(1, self.n_cpus)


def connect(address: str) -> tuple[Any, bool]:
    """Connect; return the module `ray`, and whether this call made the connection.

    Args:
        address: "local" starts a cluster on this machine, reachable from this machine only; otherwise as in `ray.init`.

    Raises:
        WorkerError: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics are sent
    if address == "local":
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's name for: loopback only
    try:
        import ray
    except ImportError as error:
        raise WorkerError("work on a cluster needs Ray: pip install 'hooked-vlm[ray]'") from error
    if ray.is_initialized():
        return ray, False
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **local)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise WorkerError(
            f"cannot connect to a Ray cluster at {address!r} ({why(error)}): start one with `ray start --head`, or use "
            '"local" for one of this machine\'s own'
        ) from error
    return ray, True


def n_gpus_of(ray: Any) -> int:
    """Number of GPUs of a cluster."""
    return int(sum(node.get("GPU", 0) for node in _nodes(ray)))


def share_of(ray: Any, n: int, on_gpus: bool) -> Share:
    """Resources of each of `n` workers: a GPU and its share of cores, or an equal share of all cores.

    Raises:
        WorkerError: the cluster is too small for `n` workers.
    """
    nodes = _nodes(ray)
    if on_gpus:
        with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
        if n_gpus_of(ray) < n:
            raise WorkerError(f"{n} workers need a GPU each, and the Ray cluster has {n_gpus_of(ray)}")
        return Share(min(int(node.get("CPU", 0) // node["GPU"]) for node in with_gpus), 1)
    cores = [int(node.get("CPU", 0)) for node in nodes]
    fitting = [c for c in range(1, max(cores, default=0) + 1) if sum(own // c for own in cores) >= n]
    if not fitting:
        raise WorkerError(f"{n} workers need a core each, and the Ray cluster has {sum(cores)}")
    return Share(max(fitting), 0)


def _nodes(ray: Any) -> list[dict[str, int | float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
