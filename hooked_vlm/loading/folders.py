"""Folders of checkpoints: given, bundled with the library, or downloaded from the hub."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from hooked_vlm.errors import CheckpointError

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
        CheckpointError: there is none, or the hub refuses it.
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
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=list(files),
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"cannot get {name!r} from the hub ({reason}): check the name and the connection, or pass the "
            f"path of a downloaded folder; {bundled}"
        ) from error
