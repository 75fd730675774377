"""Data sets that are built once into a folder with a manifest, and read from there.

<folder>/<name>-<hash of the settings>/manifest.json, examples.jsonl, images/00000-0.png ...
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from hooked_vlm.errors import OutputError, StudyError
from hooked_vlm.experiments.ocr_heads.examples import Evidence, Example
from hooked_vlm.runtime.files import why

FORMAT = 1
"""To be incremented when the same settings give other examples."""


@dataclass(frozen=True, eq=False)
class DataSet:
    """Examples and their source."""

    name: str
    examples: list[Example]
    source: str
    """In words: a hub data set, or synthetic."""
    digest: str
    """Hash of the content."""


def load_or_build(
    folder: Path, name: str, settings: Mapping[str, Any], build: Callable[[], tuple[Sequence[Example], str]]
) -> DataSet:
    """Read the data set of these settings from the folder, or build it there.

    Args:
        settings: everything the content depends on: seed, number, lengths.
        build: returns the examples and their source in words.

    Raises:
        StudyError: files of the data set were changed or damaged.
        OutputError: the folder cannot be written.
    """
    key = json.dumps({"name": name, "format": FORMAT, **settings}, sort_keys=True)
    place = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (place / "manifest.json").exists():
        examples, source = build()
        _write(place, name, dict(settings), examples, source)
    return _read(place, name)


def _write(place: Path, name: str, settings: dict[str, Any], examples: Sequence[Example], source: str) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as aside:
            made = Path(aside) / "made"
            (made / "images").mkdir(parents=True)
            lines = [json.dumps(_record(made, i, example)) for i, example in enumerate(examples)]
            (made / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            hashes = {str(f.relative_to(made)): _hash(f) for f in sorted(made.rglob("*")) if f.is_file()}
            manifest = {
                "name": name,
                "format": FORMAT,
                "settings": settings,
                "source": source,
                "n": len(examples),
                "versions": {package: version(package) for package in ("pillow", "numpy", "hooked-vlm")},
                "sha256": hashes,
            }
            (made / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            if (place / "manifest.json").exists():
                return  # another process was faster, and may be reading it
            if place.exists():  # without a manifest: incomplete
                shutil.rmtree(place)
            made.rename(place)
    except OSError as error:
        if (place / "manifest.json").exists():
            return  # another process was faster
        raise OutputError(f"cannot write the data set {place}: {why(error)}") from error


def _record(made: Path, index: int, example: Example) -> dict[str, Any]:
    names = []
    for number, picture in enumerate(example.images):
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        names.append(f"images/{index:05d}-{number}.png")
        image.convert("RGB").save(made / names[-1])
    return {
        "question": example.question,
        "answers": example.answers,
        "images": names,
        "evidence": [asdict(e) for e in example.evidence],
        "context": example.context,
        "answer_at": example.answer_at,
    }


def _read(place: Path, name: str) -> DataSet:
    try:
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        hashes, source = manifest["sha256"], manifest["source"]
        # no name may lead out of the folder, and every file of the examples needs a hash
        if missing := sorted({"examples.jsonl", *hashes} - {str(f.relative_to(place)) for f in place.rglob("*")}):
            raise ValueError(f"{missing[0]} is not in the folder")
        changed = [file for file, digest in hashes.items() if _hash(place / file) != digest]
        records = [json.loads(line) for line in (place / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
        examples = [_example(place, record, hashes) for record in records]
        if "examples.jsonl" not in hashes or not isinstance(source, str):
            raise ValueError("the manifest lacks the hash of examples.jsonl or the source")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StudyError(
            f"the data set in {place} is damaged ({error}): delete the folder to build it again"
        ) from error
    if changed:
        raise StudyError(f"{place / changed[0]} was changed since it was built: delete {place} to build it again")
    digest = hashlib.sha256(json.dumps(manifest["sha256"], sort_keys=True).encode()).hexdigest()[:16]
    return DataSet(name, examples, source, digest)


def _example(place: Path, record: Mapping[str, Any], hashes: Mapping[str, str]) -> Example:
    if unknown := [image for image in record["images"] if image not in hashes]:
        raise ValueError(f"{unknown[0]!r} is not one of its pictures")
    numbers = [n for e in record["evidence"] for n in (e["start"], e["stop"], e["image"], *e["box"])]
    texts = [record["question"], record["context"], *record["answers"]]
    at = record["answer_at"]
    if not all(isinstance(text, str) for text in texts) or not isinstance(record["answers"], list) or not texts[2:]:
        raise TypeError("questions, contexts and answers are texts")
    if not all(isinstance(n, int | float) for n in numbers) or any(len(e["box"]) != 4 for e in record["evidence"]):
        raise TypeError("evidence is a span of characters and a box in a picture")
    if at is not None and not isinstance(at, int):
        raise TypeError("answer_at is a position in the context")
    return Example(
        record["question"],
        tuple(record["answers"]),
        tuple(place / image for image in record["images"]),
        tuple(Evidence(e["start"], e["stop"], e["image"], tuple(e["box"])) for e in record["evidence"]),
        record["context"],
        at,
    )


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
