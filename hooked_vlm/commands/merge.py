"""`hooked-vlm merge`: one whole of what shards of a sweep, or of a stream of activations, wrote."""

from typing import Any

from hooked_vlm.activations.join import check_complete, join_activations
from hooked_vlm.activations.shards import MANIFEST
from hooked_vlm.commands import cache
from hooked_vlm.commands.config import MergeConfig
from hooked_vlm.errors import InputError
from hooked_vlm.experiments.head_sweep import commands as sweep
from hooked_vlm.experiments.head_sweep.results import RECORD
from hooked_vlm.experiments.head_sweep.study import merge


def answer(config: MergeConfig) -> tuple[str, dict[str, Any]]:
    """Join the folders; what to print, and the same as data.

    Raises:
        InputError: no folders, or folders of both kinds, or of neither.
    """
    if not config.folders:
        raise InputError("name the folders to merge: hooked-vlm merge FOLDER [FOLDER ...] --out OUT")
    if config.out.resolve() in [folder.resolve() for folder in config.folders]:
        raise InputError(f"--out {config.out} is one of the folders to merge: choose another")
    if all((folder / RECORD).exists() for folder in config.folders):
        return sweep.told(merge(list(config.folders), config.out))
    if all((folder / MANIFEST).exists() for folder in config.folders):
        check_complete(config.folders)
        return cache.told(join_activations(config.folders, config.out, progress=not config.quiet))
    for folder in config.folders:
        if not any((folder / name).exists() for name in (RECORD, MANIFEST)):
            raise InputError(
                f"{folder} holds neither a finished sweep ({RECORD}) nor a stream of activations ({MANIFEST})"
            )
    raise InputError("some folders hold sweeps and others activations: merge each kind by itself")
