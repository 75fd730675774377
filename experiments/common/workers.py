"""Who does a study's work (this process, or workers on a Ray cluster), and in what form it is handed over."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.constructors import PrimitiveConstructorSpec

from hooked_vlm.errors import StudyError

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM
    from hooked_vlm.runtime.tasks import Workers

RayAddress = Annotated[
    str | None,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[ADDRESS]",
        instance_from_str=lambda given: _address(given),
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [] if value is None else [value],
    ),
]
"""`--ray` alone means a cluster of this machine's own."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Settings that say who does the work; results do not depend on them."""

    ray: RayAddress = None
    """Work on Ray: "auto" for the cluster that runs here, host:port for another, no address for one of this machine's
    own. Without --ray all is done in this process."""
    workers: int | None = None
    """How many workers on Ray, each with a replica of the model; one for each GPU, or two, by default."""

    def check_workers(self) -> None:
        """Refuse workers out of range.

        Raises:
            StudyError: names the setting.
        """
        if self.workers is not None and self.workers < 1:
            raise StudyError(f"--workers must be at least 1, got {self.workers}")
        if self.workers is not None and self.ray is None:
            raise StudyError("--workers says how many workers do the work on Ray: it goes with --ray")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of whatever writes a report."""

    zip: bool = False
    """Also pack the report with its figures and tables into report.zip."""


@dataclass(frozen=True, kw_only=True)
class WorkersConfig(RayConfig, ReportConfig):
    """Settings of a study that results do not depend on."""


NOT_RECORDED = ("ray", "workers", "zip")
"""Settings that no result depends on."""


def workers_of(config: RayConfig, model: "HookedVLM", device: str | None) -> "Workers":
    """Return the configured workers; close them when the work is done. `device`: of replicas on Ray."""
    from hooked_vlm.runtime.ray_workers import OnRay  # not above: the command line needs the settings alone
    from hooked_vlm.runtime.tasks import InProcess

    return InProcess(model) if config.ray is None else OnRay(model, config.ray, config.workers, device=device)


def _address(given: list[str]) -> str:
    if len(given) > 1:
        raise ValueError(f"--ray takes one address, got {' '.join(given)}")
    return given[0] if given else "local"
