"""`hooked-vlm push`: a stream of activations or the tables of a run, as a data set of Hugging Face."""

from typing import Any

from hooked_vlm.activations.hub import push_activations
from hooked_vlm.activations.read import Activations
from hooked_vlm.activations.shards import MANIFEST
from hooked_vlm.commands.config import PushConfig
from hooked_vlm.experiments.common.publish import push_tables


def answer(config: PushConfig) -> tuple[str, dict[str, Any]]:
    """Send the folder; what to print, and the same as data."""
    if (config.folder / MANIFEST).exists():
        place = push_activations(Activations(config.folder), config.to, private=not config.public)
    else:
        place = push_tables(config.folder, config.to, private=not config.public)
    return f"data set: {place}", {"data_set": place}
