"""What holds for every test: no network, a fixed seed, a share of the cores, costly kinds only on request."""

import os
import socket

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before anything else
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from hypothesis import settings

ON_REQUEST = {
    "slow": ("--run-slow", "takes long"),
    "gpu": ("--run-gpu", "needs an accelerator"),
    "real_weights": ("--run-real-weights", "needs a published checkpoint on this machine"),
}

# The same examples on every run, and no time limit on each: a loaded machine must not fail a property.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, cores // workers))


def pytest_addoption(parser: pytest.Parser) -> None:
    for marker, (option, reason) in ON_REQUEST.items():
        parser.addoption(option, action="store_true", help=f"also run tests marked {marker}: {reason}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, (option, reason) in ON_REQUEST.items():
        if config.getoption(option):
            continue
        skip = pytest.mark.skip(reason=f"{marker}: {reason}; run with {option}")
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails at once and by name, with or without a connection."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
