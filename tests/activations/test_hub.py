"""Data sets of Hugging Face: what is sent can be read by `datasets`, and comes back as it was."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from streams import stream

from hooked_vlm import HookedVLM, InputError
from hooked_vlm.activations import Activations, load_activations, push_activations
from hooked_vlm.commands.config import PushConfig
from hooked_vlm.commands.push import answer
from hooked_vlm.data.hub import is_path
from hooked_vlm.errors import ActivationsError, OutputError
from hooked_vlm.experiments import load_tables, push_tables


@pytest.fixture(scope="module", params=[torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Activations:
    toy = HookedVLM.from_pretrained("toy-qwen2-vl", device="cpu")
    return stream(toy, tmp_path_factory.mktemp("stream"), n=3, dtype=request.param)


def test_activations_come_back_as_they_were(written: Activations, tmp_path: Path) -> None:
    text, data = answer(PushConfig(written.folder, str(tmp_path / "sent")))
    assert data["data_set"] == str(tmp_path / "sent") and data["data_set"] in text
    found = load_activations(tmp_path / "sent", tmp_path / "back")
    assert found.names == written.names and found.finished and len(found.shards) == len(written.shards)
    for name in written.names:
        assert found[name].dtype == written[name].dtype
        torch.testing.assert_close(found[name][:], written[name][:], rtol=0, atol=0)
    for kind in ("tokens", "patches", "image_tokens"):
        pd.testing.assert_frame_equal(found.table(kind), written.table(kind))
    with pytest.raises(OutputError, match="taken"):
        push_activations(written, tmp_path / "sent")
    next((tmp_path / "sent" / "tokens").glob("*.parquet")).write_bytes(b"PAR1")
    with pytest.raises(ActivationsError, match="damaged"):
        load_activations(tmp_path / "sent", tmp_path / "again")
    with pytest.raises(InputError, match="no data set of activations"):
        load_activations(tmp_path / "back" / "shards", tmp_path / "no")
    with pytest.raises(InputError, match="no folder"):
        load_activations(tmp_path / "nowhere", tmp_path / "no")


def test_datasets_reads_them(written: Activations, tmp_path: Path) -> None:
    import datasets

    push_activations(written, tmp_path / "sent")
    rows: Any = datasets.load_dataset(
        str(tmp_path / "sent"), "tokens", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(rows) == written.n_rows["tokens"]
    name = "blocks.1.attn.hook_z"
    np.testing.assert_array_equal(rows[5][name], written[name][5].flatten().float())
    assert rows[5]["token"] == written.index["token"][5]
    assert set(datasets.get_dataset_config_names(str(tmp_path / "sent"))) == {"tokens", "patches", "image_tokens"}


def test_tables_of_a_run_come_back(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "run" / "tables").mkdir(parents=True)
    scores = pd.DataFrame({"layer": [0, 1], "head": [2, 3], "score": [0.5, 0.25]})
    scores.to_parquet(tmp_path / "run" / "tables" / "scores.parquet")
    with pytest.raises(InputError, match="finished run"):
        push_tables(tmp_path / "run", tmp_path / "sent")
    (tmp_path / "run" / "run.json").write_text('{"model": "toy"}')
    answer(PushConfig(tmp_path / "run", str(tmp_path / "sent")))
    pd.testing.assert_frame_equal(load_tables(tmp_path / "sent")["scores"], scores)
    pd.testing.assert_frame_equal(load_tables(tmp_path / "run")["scores"], scores)
    read: Any = datasets.load_dataset(
        str(tmp_path / "sent"), "scores", split="train", cache_dir=str(tmp_path / "cache")
    )
    pd.testing.assert_frame_equal(read.to_pandas(), scores)
    with pytest.raises(InputError, match="no tables"):
        load_tables(tmp_path)


def test_the_hub_gets_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sent: dict[str, Any] = {}

    def upload_folder(repo_id: str, folder_path: str, repo_type: str) -> None:
        sent.update(files=sorted(str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*.*")))

    def create_repo(name: str, **settings: Any) -> None:
        sent.update(name=name, **settings)

    own = SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: own)
    Path("run/tables").mkdir(parents=True)
    Path("run/run.json").write_text("{}")
    pd.DataFrame({"a": [1]}).to_parquet("run/tables/scores.parquet")
    place = push_tables("run", "lab/scores")
    assert place.endswith("lab/scores") and sent["name"] == "lab/scores" and sent["private"]
    assert sent["files"] == ["README.md", "run.json", "tables/scores.parquet"]

    def refused(*names: Any, **settings: Any) -> None:
        raise OSError("no network")

    own.create_repo = refused
    with pytest.raises(OutputError, match="no network"):
        push_tables("run", "lab/scores")


def test_a_hub_that_cannot_be_reached_is_told(written: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("Name or service not known")  # the network's own classes derive from no OSError

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(create_repo=refused))
    with pytest.raises(OutputError, match=r"service not known.*\./lab/rows"):
        push_activations(written, "lab/rows")


def test_what_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_path("lab/scores")
    (tmp_path / "lab" / "scores").mkdir(parents=True)
    assert all(map(is_path, ("lab/scores", "./x", "/x", "~/x", "x", tmp_path)))
