"""What a hub name leads to where the hub refuses, cannot be reached, or was only reached for a part of the files.

`huggingface_hub`'s own requests are answered in its HTTP client, as the hub does (status and X-Error-Code).
"""

import json
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from hooked_vlm import CheckpointError, HookedVLM
from hooked_vlm.loading.folders import CONFIG_FILES, TOY_MODELS, find_checkpoint

ANSWERS = {  # name of the repository: status, X-Error-Code
    "gated": (401, "GatedRepo"),
    "gated-for-you": (403, "GatedRepo"),
    "nothing": (404, "RepoNotFound"),
    "private": (401, "RepoNotFound"),
    "no-revision": (404, "RevisionNotFound"),
    "bad-token": (401, None),
    "forbidden": (403, None),
    "down": (500, None),
}


http: Any = import_module(type(get_session()).__module__.partition(".")[0])
"""The HTTP library that this version of `huggingface_hub` uses."""


def answer(request: Any) -> Any:
    """Every request for a repository gets its status; of any other the connection fails."""
    known = [name for name in ANSWERS if f"/org/{name}/" in f"{request.url.path}/"]
    if not known:
        raise http.ConnectError("no route to host", request=request)
    status, code = ANSWERS[known[0]]
    told = {"X-Error-Code": code} if code else {"X-Error-Message": "Invalid credentials in Authorization header"}
    return http.Response(status, headers=told, request=request)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    set_client_factory(lambda: http.Client(transport=http.MockTransport(answer)))
    yield
    set_client_factory(default_client_factory)


SAYS = {
    "gated": r"gated.*terms.*huggingface\.co/org/gated .*hf auth login",
    "gated-for-you": r"gated.*terms.*hf auth login",
    "nothing": r"no such repository.*check the name",
    "private": r"private.*hf auth login",
    "no-revision": r"revision",
    "bad-token": r"401.*hf auth login",
    "forbidden": r"403.*token",
    "down": r"500.*later",
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.usefixtures("online")
def test_refusals_of_the_hub(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=SAYS[name]) as caught:
        HookedVLM.from_pretrained(f"org/{name}", cache_dir=tmp_path)
    assert "\n" not in str(caught.value) and f"org/{name}" in str(caught.value)


def test_offline_machines(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not in the cache.*local_files_only.*hf download org/it"):
        HookedVLM.from_pretrained("org/it", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(CheckpointError, match=r"not in the cache.*HF_HUB_OFFLINE.*hf download org/it"):
        HookedVLM.from_pretrained("org/it", cache_dir=tmp_path)


@pytest.mark.usefixtures("online")
def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be reached.*hf download org/it"):
        HookedVLM.from_pretrained("org/it", cache_dir=tmp_path)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """The cache's folder of `org/toy`, complete."""
    repository = tmp_path / "models--org--toy"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    return Path(shutil.copytree(TOY_MODELS / "toy-qwen2-vl", repository / "snapshots" / ("0" * 40)))


def test_a_complete_snapshot_loads_offline(snapshot: Path, tmp_path: Path) -> None:
    assert find_checkpoint("org/toy", cache_dir=tmp_path) == snapshot
    assert HookedVLM.from_pretrained("org/toy", cache_dir=tmp_path).tokenizer is not None


@pytest.mark.parametrize("gone", ["weights", "config", "a shard", "a link's target"])
def test_a_partly_cached_snapshot(gone: str, snapshot: Path, tmp_path: Path) -> None:
    weights = snapshot / "model.safetensors"
    named = {"config": "config.json", "a shard": "model-2.safetensors"}.get(gone, "model.safetensors")
    if gone == "config":
        (snapshot / "config.json").unlink()
    elif gone == "a shard":
        weights.rename(snapshot / "model-1.safetensors")
        files = {"a": "model-1.safetensors", "b": named}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        weights.unlink()
        if gone == "a link's target":
            weights.symlink_to("../../blobs/nowhere")
    with pytest.raises(CheckpointError, match=rf"org/toy.*lacks {named}.*hf download org/toy"):
        HookedVLM.from_pretrained("org/toy", cache_dir=tmp_path)
    if gone != "config":
        assert find_checkpoint("org/toy", cache_dir=tmp_path, files=CONFIG_FILES) == snapshot
        HookedVLM.without_weights("org/toy", cache_dir=tmp_path)
