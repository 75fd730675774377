"""Folders of checkpoints: given, bundled with the library, or downloaded from the hub."""

from collections.abc import Sequence
from pathlib import Path

from hooked_vlm.converters import read_json
from hooked_vlm.converters.checkpoint import INDEX_FILE, SINGLE_FILE, listed
from hooked_vlm.errors import CheckpointError
from hooked_vlm.loading.hub import download

TOY_MODELS = Path(__file__).parents[1] / "toy_models"
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""Patterns of the files that a checkpoint is loaded from."""
CONFIG_FILES = ("config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def bundled_models() -> list[str]:
    """Names of the toy models that come with the library."""
    return sorted(path.parent.name for path in TOY_MODELS.glob("*/config.json"))


def find_checkpoint(
    name_or_path: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    files: Sequence[str] = FILES,
) -> Path:
    """Return the folder of a checkpoint; of a hub name, files that match `files` (patterns) are downloaded.

    Raises:
        CheckpointError: there is none, the hub refuses it or cannot be reached, or only a part of it is here.
    """
    name, toys = str(name_or_path), bundled_models()
    if name in toys and not Path(name).exists():
        return TOY_MODELS / name
    path = Path(name).expanduser()
    if path.exists():
        return path
    bundled = f"bundled models are {', '.join(toys)}" if toys else "there are no bundled models"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no checkpoint folder {name!r}, nor is it a hub name (owner/model); {bundled}")
    folder = download(name, files, revision, cache_dir, local_files_only)
    if files == FILES and (lacking := _lacking(folder)):
        raise CheckpointError(
            f"the copy of {name} in {folder} lacks {lacking}: it was downloaded in part, or the repository has none; "
            f"with a connection, run `hf download {name}`"
        )
    return folder


def _lacking(folder: Path) -> str:
    """The files that a checkpoint cannot do without and this folder lacks; empty if it is complete."""
    if not (folder / "config.json").exists():
        return "" if (folder / "adapter_config.json").exists() else "config.json"  # an adapter is refused by name
    if (folder / SINGLE_FILE).exists():
        return ""
    if not (folder / INDEX_FILE).exists():
        return f"{SINGLE_FILE} and {INDEX_FILE}"
    shards = read_json(folder, INDEX_FILE, default={}).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else ()
    gone = sorted(str(name) for name in names if isinstance(name, str) and not (folder / name).exists())
    return listed(gone, most=3)
