"""Data sets of Hugging Face as folders: sent to the hub or to a path, and brought from there."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hooked_vlm.errors import HookedVLMError, InputError, OutputError
from hooked_vlm.runtime.files import why

README = "README.md"


def is_path(name: str | Path) -> bool:
    """Whether a name is a path on this machine, and not a repository of the hub (owner/name)."""
    text = str(name)
    return isinstance(name, Path) or text.startswith((".", "/", "~")) or Path(text).exists() or text.count("/") != 1


def send(write: Callable[[Path], Any], name: str | Path, *, private: bool = True) -> str:
    """Have `write` make a data set's folder, at a path or on the hub; return where it is.

    Raises:
        OutputError: the path is taken or cannot be written; the hub refuses (no login, no network).
    """
    if is_path(name):
        path = Path(name).expanduser()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"{path} is taken: choose a new folder for the data set")
        path.mkdir(parents=True, exist_ok=True)
        write(path)
        return str(path)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(str(name), repo_type="dataset", private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            api.upload_folder(repo_id=str(name), folder_path=folder, repo_type="dataset")
    except HookedVLMError:  # of what is written
        raise
    except Exception as error:  # the hub's own errors, and those of the network below it
        raise OutputError(
            f"cannot send the data set {name} to the hub ({why(error)}): hf auth login? A folder is named ./{name}"
        ) from error
    return f"https://huggingface.co/datasets/{name}"


def bring(name: str | Path) -> Path:
    """The folder of a data set: the path itself, or a copy of the hub's repository in its cache.

    Raises:
        InputError: there is no such data set, or it cannot be reached.
    """
    if is_path(name):
        path = Path(name).expanduser()
        if not path.is_dir():
            raise InputError(f"there is no folder {path}")
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), repo_type="dataset"))
    except Exception as error:  # the hub's own errors, and those of the network below it
        raise InputError(f"cannot bring the data set {name} from the hub ({why(error)})") from error


def write_readme(folder: Path, title: str, text: str, files: Mapping[str, str]) -> None:
    """Write README.md, whose header tells `datasets` which files are which configuration.

    Args:
        files: pattern of the Parquet files of each configuration.
    """
    configs = [{"config_name": name, "data_files": [{"split": "train", "path": path}]} for name, path in files.items()]
    header = json.dumps({"configs": configs, "tags": ["interpretability", "hooked_vlm"]}, indent=2)  # YAML, too
    (folder / README).write_text(f"---\n{header}\n---\n\n# {title}\n\n{text}\n", encoding="utf-8")


def copied(source: Path, to: Path) -> None:
    """Copy a file to a path whose folders may not exist yet."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, to)
