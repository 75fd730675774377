"""Which data a command runs on."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hooked_vlm.errors import InputError

if TYPE_CHECKING:
    from hooked_vlm.data.sources import Samples


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set, and the part of it that is wanted."""

    data: Path
    """A folder of pictures (then --prompt), JSON lines or CSV (id, prompt, images, boxes, answer), or a data set of
    Hugging Face: a hub name, a folder that save_to_disk wrote, a Parquet file."""
    prompt: str | None = None
    """Asked about every picture of a folder, and where a sample has no prompt."""
    split: str | None = None
    """The split of a data set of Hugging Face."""
    subset: str | None = None
    """The configuration of a data set of Hugging Face."""
    limit: int | None = None
    """Only the first so many samples."""
    shard: str | None = None
    """Only this part of the samples, counted from 0: --shard 0/8 to --shard 7/8 are all of them, for eight processes;
    `hooked-vlm merge` joins what they wrote."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether a sample that cannot be used (a broken picture) ends the work, or is left out and listed in
    skipped.csv."""
    max_pixels: int | None = None
    """Bound on the area of a resized picture (Qwen2-VL); the checkpoint's by default."""
    max_tiles: int | None = None
    """How many tiles a picture is cut into at most (InternVL); the checkpoint's by default."""

    @property
    def part(self) -> tuple[int, int]:
        """The shard and the number of shards.

        Raises:
            InputError: `shard` is not i/n.
        """
        if self.shard is None:
            return 0, 1
        i, slash, n = self.shard.partition("/")
        if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
            raise InputError(f"--shard is i/n, counted from 0, such as 0/8 (the first of eight); got {self.shard!r}")
        return int(i), int(n)

    def all_samples(self) -> "Samples":
        """The samples of all shards.

        Raises:
            InputError: see `read_samples`; no samples.
        """
        from hooked_vlm.data.sources import read_samples  # not above: the command line needs the settings alone

        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit must be at least 1, got {self.limit}")
        found = read_samples(self.data, self.prompt, split=self.split, subset=self.subset)
        if not len(found):
            raise InputError(f"{self.data} holds no samples")
        return found if self.limit is None else found.first(self.limit)

    def samples(self) -> "Samples":
        """The samples of this shard."""
        i, n = self.part
        return self.all_samples().shard(i, n)
