"""The chat template of a folder, wherever it is, against the one that a processor of `transformers` takes."""

import itertools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from hooked_vlm import CheckpointError, HookedVLM, InputError
from hooked_vlm.inputs.tokenization import load_tokenizer
from hooked_vlm.loading.chat_templates import processor_template, take_processor_template
from hooked_vlm.loading.folders import TOY_MODELS

PLACES = ("processor_config.json", "chat_template.json", "chat_template.jinja", "additional", "tokenizer_config.json")


def written(folder: Path, places: tuple[str, ...]) -> Path:
    """A folder with a tokenizer, and a template in some of the places that prints where it is."""
    vocabulary = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="[UNK]").save_pretrained(folder)
    for place in places:
        path = folder / ("additional_chat_templates/rag.jinja" if place == "additional" else place)
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".jinja":
            path.write_text(place)
        else:
            before = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**before, "chat_template": place}))
    return folder


def of_transformers(folder: Path) -> Any:
    """The template that a processor takes, else the tokenizer's; an exception if it refuses the folder."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # it leaves files open
            stated = ProcessorMixin.get_processor_dict(folder)[0].get("chat_template")
    except ValueError as error:
        return error
    return PreTrainedTokenizerFast.from_pretrained(folder).chat_template if stated is None else stated


@pytest.mark.parametrize(
    "places", [c for n in range(len(PLACES) + 1) for c in itertools.combinations(PLACES, n)], ids=" + ".join
)
def test_the_template_is_the_one_that_transformers_takes(places: tuple[str, ...], tmp_path: Path) -> None:
    folder = written(tmp_path, places)
    expected = of_transformers(folder)
    tokenizer: Any = load_tokenizer(folder)
    if isinstance(expected, ValueError):
        with pytest.raises(CheckpointError, match=r"chat_template\.json.*rag"):
            take_processor_template(tokenizer, folder)
        return
    take_processor_template(tokenizer, folder)
    assert tokenizer.chat_template == expected


def test_named_templates_without_a_default_are_refused_by_name(tmp_path: Path) -> None:
    shutil.copytree(TOY_MODELS / "toy-qwen2-vl", tmp_path / "checkpoint")
    for jinja in (tmp_path / "checkpoint").glob("*.jinja"):
        jinja.unlink()
    (tmp_path / "checkpoint/additional_chat_templates").mkdir()
    (tmp_path / "checkpoint/additional_chat_templates/rag.jinja").write_text("RAG")
    model = HookedVLM.from_pretrained(tmp_path / "checkpoint")
    with pytest.raises(InputError, match=r"rag.*default"):
        model.chat_text("What")
    (tmp_path / "checkpoint/chat_template.jinja").write_text("DEFAULT")
    assert HookedVLM.from_pretrained(tmp_path / "checkpoint").chat_text("What") == "DEFAULT"


def test_a_template_survives_saving(tmp_path: Path) -> None:
    shutil.copytree(TOY_MODELS / "toy-qwen2-vl", tmp_path / "checkpoint")
    (tmp_path / "checkpoint/chat_template.json").write_text('{"chat_template": "LEGACY {{ messages[0].role }}"}')
    model = HookedVLM.from_pretrained(tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "again")
    again = HookedVLM.from_pretrained(tmp_path / "again")
    assert again.chat_text("What") == model.chat_text("What") == "LEGACY user"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.json", b"{}"),
        ("chat_template.json", b'{"chat_template": 3}'),
        ("chat_template.json", b"{"),
        ("processor_config.json", b'{"chat_template": ["x"]}'),
        ("processor_config.json", b'{"chat_template": {"default": 1}}'),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_files_without_a_template_are_named(file: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file}|chat template"):
        processor_template(tmp_path)
