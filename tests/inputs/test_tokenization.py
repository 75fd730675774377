"""InternLM2's tokenizer rebuilt from its SentencePiece model, against SentencePiece itself."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_internvl import ADDED, train_tokenizer
from tokenizers import ByteLevelBPETokenizer

from hooked_vlm import CheckpointError
from hooked_vlm.inputs.tokenization import load_tokenizer

ODDITIES = [
    "a word",
    " leading space",
    "two  spaces   three",
    "trailing ",
    "\nnew\n\nlines\t",
    "naïve café, Ünïcode",
    "你好，世界",
    "emoji 🙂 falls back to bytes",
    "<|im_start|>user\nWhat is this?<|im_end|><|im_start|>assistant\n",
    "<img><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat?",
    "text <img> inside",
    "12345 0.5%",
    "<s>",
]


VARIANTS = {
    "no-dummy-prefix": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "dummy-prefix": {"add_dummy_prefix": True, "remove_extra_whitespaces": False},
    "one-space-only": {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
    "own-symbols": {"remove_extra_whitespaces": False, "user_defined_symbols": ["[UNUSED_TOKEN_1]", "value"]},
}


@pytest.fixture(scope="module", params=VARIANTS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    processor = train_tokenizer(folder, **VARIANTS[request.param])
    return load_tokenizer(folder), processor


def published(processor: Any, text: str) -> list[int]:
    """The published class: added tokens are cut out, every piece between them goes through SentencePiece."""
    names = [*ADDED, "<s>", "</s>", "<unk>"]
    ids = [processor.bos_id()]
    for piece in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
        if piece in ADDED:
            ids.append(len(processor) + ADDED.index(piece))
        elif piece in names:
            ids.append(processor.piece_to_id(piece))
        elif piece:
            ids += processor.encode(piece)
    return ids


@pytest.mark.parametrize("text", ODDITIES)
def test_ids_are_those_of_sentencepiece(both: tuple[Any, Any], text: str) -> None:
    tokenizer, processor = both
    assert tokenizer.encode(text) == published(processor, text)
    assert tokenizer.encode(text, add_special_tokens=False) == published(processor, text)[1:]


@given(text=st.text(alphabet="atuseri wlg\n你0🙂", max_size=30))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_are_those_of_sentencepiece_for_any_text(both: tuple[Any, Any], text: str) -> None:
    tokenizer, processor = both
    assert tokenizer.encode(text) == published(processor, text)


@pytest.mark.parametrize("text", ["a word", "naïve 🙂 café", "你好，世界", "two  spaces", "12345"])
def test_there_and_back(both: tuple[Any, Any], text: str) -> None:
    tokenizer, processor = both
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == processor.decode(ids)


def test_special_tokens_and_saving(both: tuple[Any, Any], tmp_path: Path) -> None:
    tokenizer, processor = both
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (processor.bos_id(), processor.eos_id())
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == len(processor) + 4
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again is not None
    for text in ODDITIES:
        assert again.encode(text) == tokenizer.encode(text)


def test_a_folder_without_the_model_file(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "InternLM2Tokenizer"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="read"):
        load_tokenizer(tmp_path)


def test_added_tokens_must_have_their_ids(tmp_path: Path) -> None:
    train_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"999": {"content": "<img>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'<img>'.*999"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- tokenizers that transformers knows


@pytest.mark.parametrize(
    ("says", "starts"), [({}, True), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False)]
)
def test_llamas_tokenizer_begins_a_text_unless_told_not_to(says: dict[str, bool], starts: bool, tmp_path: Path) -> None:
    """As in the versions of transformers that the checkpoints were published for."""
    processor = train_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", **says}
    del config["auto_map"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "internvl_chat", "auto_map": {"AutoConfig": "a.B"}}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.encode("a word")[0] == processor.bos_id()) is starts
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == len(processor) + ADDED.index("<IMG_CONTEXT>")


def test_qwen2s_tokenizer_beside_a_configuration_with_remote_code(tmp_path: Path, capfd: Any) -> None:
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(["hello world what is the image"] * 50, vocab_size=300)
    learner.save_model(str(tmp_path))
    added = {str(learner.get_vocab_size() + i): {"content": t, "special": True} for i, t in enumerate(ADDED)}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "internvl_chat", "auto_map": {"AutoConfig": "a.B"}}')
    capfd.readouterr()  # what the training printed
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    ids = tokenizer.encode("<|im_start|>hello<img><IMG_CONTEXT></img>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "hello", "<img>", "<IMG_CONTEXT>", "</img>"]
    assert capfd.readouterr() == ("", "")
