"""Where samples come from: a folder of pictures, JSON lines, CSV, or a data set of Hugging Face `datasets`.

samples = read_samples("pages.jsonl")
samples.first(1000).shard(3, 8)  # 125 of them
"""

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from hooked_vlm.data.samples import NamedBox, Sample
from hooked_vlm.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FIELDS = ("id", "prompt", "images", "boxes", "answer")
OTHER_NAMES = {"question": "prompt", "image": "images", "question_id": "id", "answers": "answer"}
"""Names that data sets of questions use for the same; read where the first is missing."""


class Source(ABC):
    """A data set that can be opened again in another process."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, start: int, stop: int) -> Iterator[Sample]:
        """Samples number `start` to `stop` - 1."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples `start` to `stop` - 1 of a data set: read one by one, as often as they are iterated over."""

    source: Source
    start: int
    stop: int
    divided: tuple[int, int] | None = None
    """Start and stop of the samples that this is a shard of; of shards of a shard, those of the first division."""

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Sample]:
        return self.source.read(self.start, self.stop)

    def first(self, n: int) -> "Samples":
        """The first `n` of them, or all if there are fewer.

        Raises:
            InputError: `n` below 1.
        """
        if n < 1:
            raise InputError(f"the number of samples must be at least 1, got {n}")
        return replace(self, stop=min(self.stop, self.start + n))

    def shard(self, i: int, n: int) -> "Samples":
        """The `i`-th of `n` parts, counted from 0: consecutive samples, so that the parts in their order are the whole.

        Raises:
            InputError: there is no such part.
        """
        if not 0 <= i < n:
            raise InputError(f"there is no shard {i}/{n}: {n} shards are counted from 0 to {n - 1}")
        start, stop = (self.start + len(self) * part // n for part in (i, i + 1))
        return Samples(self.source, start, stop, self.divided or (self.start, self.stop))


def read_samples(
    path: str | Path, prompt: str | None = None, *, split: str | None = None, subset: str | None = None
) -> Samples:
    """The samples of a data set.

    - A folder of pictures: every picture with the same prompt, in the order of their names.
    - JSON lines: a line is `{"id": ..., "prompt": ..., "images": [paths], "boxes": [{"name", "box", "image"}],
      "answer": ...}`.
    - CSV with such columns; `image` is one path, `images` and `boxes` are JSON.
    - A data set of Hugging Face `datasets`: a hub name, a folder that `save_to_disk` wrote, a Parquet file. Its columns
      have these names, or `question`, `image`, `question_id`, `answers` (the first of them counts).

    Only the prompt is required, and not even that if `prompt` is given. Paths are relative to the file. Without an id,
    a sample is called by its number, from 0.

    Args:
        split, subset: part and configuration of a data set of Hugging Face, where it has several.

    Raises:
        InputError: no such data set, no pictures; while they are read, a line that cannot be used (which is named).
    """
    source = _source(Path(path), str(path), prompt, split, subset)
    if (split or subset) and not isinstance(source, Tables):
        raise InputError(f"{path} is no data set of Hugging Face: it has neither splits nor subsets")
    return Samples(source, 0, len(source))


def _source(path: Path, name: str, prompt: str | None, split: str | None, subset: str | None) -> Source:
    if path.is_dir() and not any((path / own).exists() for own in ("dataset_info.json", "dataset_dict.json")):
        if any(path.glob("*.parquet")) and not any(path.glob("*.png")):
            return Tables(name, prompt, split, subset)
        return Pictures(path, _asked(prompt))
    if path.is_file() and path.suffix == ".csv":
        return Csv(path, prompt)
    if path.is_file() and path.suffix != ".parquet":
        return JsonLines(path, prompt)
    if path.exists() or _may_be_on_the_hub(name):
        return Tables(name, prompt, split, subset)
    raise InputError(
        f"there is no file or folder {path}: give a folder of pictures, a .jsonl or .csv file, or the name of a data "
        "set on the hub (owner/name)"
    )


def _may_be_on_the_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith((".jsonl", ".csv"))


def _asked(prompt: str | None) -> str:
    if prompt is None:
        raise InputError("a folder of pictures needs a prompt to ask about each of them: --prompt")
    return prompt


@dataclass(frozen=True)
class Pictures(Source):
    """Every picture of a folder, with the same prompt."""

    folder: Path
    prompt: str

    @cached_property
    def paths(self) -> list[Path]:
        found = sorted(p for p in self.folder.iterdir() if p.suffix.lower() in PICTURES)
        if not found:
            raise InputError(f"the folder {self.folder} holds no pictures ({', '.join(PICTURES)})")
        return found

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        return (Sample(path.name, self.prompt, (path,)) for path in self.paths[start:stop])


@dataclass(frozen=True)
class JsonLines(Source):
    """A file with a sample in every line that is not blank."""

    path: Path
    prompt: str | None

    def __len__(self) -> int:
        with self.path.open("rb") as lines:
            return sum(1 for line in lines if line.strip())

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        seen: set[str] = set()
        with self.path.open(encoding="utf-8-sig") as lines:
            filled = ((n, line) for n, line in enumerate(lines, start=1) if line.strip())
            for number, (n, line) in enumerate(islice(filled, start, stop), start=start):
                yield _named(seen, f"{self.path}, line {n}", lambda line=line: json.loads(line), number, self)


@dataclass(frozen=True)
class Csv(Source):
    """A table with a header; cells that are empty are left out."""

    path: Path
    prompt: str | None

    def __len__(self) -> int:
        with self._open() as file:
            return max(0, sum(1 for row in csv.reader(file) if row) - 1)  # blank lines are no rows

    def _open(self) -> Any:
        return self.path.open(encoding="utf-8-sig", newline="")

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        seen: set[str] = set()
        with self._open() as file:
            for number, row in enumerate(islice(csv.DictReader(file, strict=True), start, stop), start=start):
                yield _named(seen, f"{self.path}, row {number + 1}", lambda row=row: _from_cells(row), number, self)


def _from_cells(row: Mapping[Any, Any]) -> dict[str, Any]:
    if None in row:
        raise ValueError("got more cells than the header has")
    cells = {name: value for name, value in row.items() if value not in ("", None)}
    return {name: json.loads(value) if name in ("images", "boxes") else value for name, value in cells.items()}


@dataclass(frozen=True)
class Tables(Source):
    """A data set of Hugging Face `datasets`; pictures are decoded when their sample is processed."""

    name: str
    prompt: str | None
    split: str | None
    subset: str | None

    @cached_property
    def rows(self) -> Any:
        import datasets

        found = self._loaded(datasets)
        if isinstance(found, Mapping):
            if self.split not in found and (self.split is not None or len(found) > 1):
                raise InputError(f"{self.name} has the splits {', '.join(found)}: name one with --split")
            found = found[self.split] if self.split is not None else next(iter(found.values()))
        for column, kind in found.features.items():
            if isinstance(kind, datasets.Image):
                found = found.cast_column(column, datasets.Image(decode=False))
            elif isinstance(kind, datasets.List | datasets.LargeList) and isinstance(kind.feature, datasets.Image):
                found = found.cast_column(column, datasets.List(datasets.Image(decode=False)))
        return found

    def _loaded(self, datasets: Any) -> Any:
        path = Path(self.name)
        try:
            if path.is_dir() and not any(path.glob("*.parquet")):
                return datasets.load_from_disk(self.name)
            if path.is_file():
                return datasets.load_dataset("parquet", data_files=self.name)
            return datasets.load_dataset(self.name, self.subset)
        except Exception as error:  # of the hub, of files, of the data set's own description
            said = " ".join(str(error).split())
            raise InputError(f"cannot open the data set {self.name} ({type(error).__name__}: {said})") from error

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # opened again elsewhere

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        seen: set[str] = set()
        for number in range(start, stop):
            yield _named(seen, f"{self.name}, row {number}", lambda n=number: self._fields(self.rows[n]), number, self)

    @staticmethod
    def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
        known = {name: row[name] for name in (*FIELDS, *OTHER_NAMES) if row.get(name) is not None}
        return {name: str(value) if name in ("id", "question_id") else value for name, value in known.items()}


# ---------------------------------------------------------------- one sample


def _named(seen: set[str], where: str, read: Any, number: int, source: Any) -> Sample:
    """A sample, or an error that says where it stands."""
    try:
        sample = _from_fields(read(), str(number), source.prompt, _folder_of(source))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{where}: expected one sample, {error}") from error
    if sample.id in seen:
        raise InputError(f"{where}: the id {sample.id!r} is taken already: every sample needs its own")
    seen.add(sample.id)
    return sample


def _folder_of(source: Any) -> Path | None:
    return source.path.parent if hasattr(source, "path") else None


def _from_fields(given: Any, id: str, prompt: str | None, folder: Path | None) -> Sample:
    """A sample of its fields; paths are relative to `folder`."""
    if not isinstance(given, dict):
        raise TypeError(f"as a JSON object, got a {type(given).__name__}")
    found = {name: value for name, value in given.items() if name not in OTHER_NAMES}
    for other, name in OTHER_NAMES.items():
        if other in given:
            found.setdefault(name, given[other])
    if unknown := sorted(set(found) - set(FIELDS)):
        raise ValueError(f"got the unknown field {unknown[0]!r} (known: {', '.join((*FIELDS, *OTHER_NAMES))})")
    images, boxes = found.get("images", []), found.get("boxes", [])
    images = images if isinstance(images, list) else [images]
    kinds = str if folder else str | dict
    if not all(isinstance(image, kinds) for image in images):
        raise TypeError(f"got images that are no list of paths: {images!r}")
    asked = found.get("prompt", prompt)
    if not isinstance(asked, str | list):
        raise TypeError("got no prompt")
    named = tuple(NamedBox(str(b["name"]), tuple(map(float, b["box"])), int(b.get("image", 0))) for b in boxes)
    pictures = tuple(image if folder is None else folder / image for image in images)
    return Sample(str(found.get("id", id)), asked, pictures, named, _answer(found.get("answer")))


def _answer(given: Any) -> str | None:
    first = next(iter(given), None) if isinstance(given, list) else given
    if first is not None and not isinstance(first, str):
        raise TypeError(f"got an answer that is no text: {first!r}")
    return first or None
