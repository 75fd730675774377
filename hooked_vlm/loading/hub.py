"""Downloads from the Hugging Face hub, and what to do where one is not possible."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hooked_vlm.errors import CheckpointError

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def download(
    name: str, files: Sequence[str], revision: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> Path:
    """Return the folder of a hub repository's files, downloaded or from the cache.

    Raises:
        CheckpointError: it is gated, private, not there, not in the cache of a machine that is offline, or the
            download fails; what to do is said.
    """
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
    except Exception as error:  # besides the hub's errors those of whichever HTTP library it uses
        raise CheckpointError(f"cannot get {name!r} from the hub: {_advice(error, name, local_files_only)}") from error


def _advice(error: Exception, name: str, local_files_only: bool) -> str:
    """The cause of a failed download, and what to do."""
    elsewhere = f"run `hf download {name}` where there is a connection, and pass the folder"
    partly = type(error).__name__ == "IncompleteSnapshotError"  # of newer versions of huggingface_hub
    if isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # the hub was asked, refused, and then the cache was looked at
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, GatedRepoError):
        return f"it is gated: accept its terms at https://huggingface.co/{name} and {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision: check the revision"
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return f"there is no such repository, or it is private: check the name; if it is private, {LOG_IN}"
    if status in (401, 403):
        return f"access is refused (HTTP {status}): {LOG_IN}, with a token that may read it"
    if status is not None:
        return f"the hub answers with HTTP {status}: try again later, or pass the path of a downloaded folder"
    if isinstance(error, HFValidationError):
        return "this is not a hub name (owner/model): check the spelling, or pass the path of a folder"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        part = "only a part of it is" if partly else "it is not"
        if local_files_only:
            return f"{part} in the cache, and local_files_only=True: leave that out, or {elsewhere}"
        if constants.HF_HUB_OFFLINE:
            return f"{part} in the cache, and HF_HUB_OFFLINE is set: unset it, or {elsewhere}"
        return f"{part} in the cache, and the hub cannot be reached: check the connection, or {elsewhere}"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"the download failed ({reason}): check connection, proxy and disk, or {elsewhere}"
