"""Copies of an answer are found however the tokenizer cuts the reply: a perfect head scores one in every form of it."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from families import own_copy, tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hooked_vlm import HookedVLM, VLMInputs
from hooked_vlm.experiments.ocr_heads.alignment import align
from hooked_vlm.experiments.ocr_heads.config import OFFICIAL_CODE, Protocol
from hooked_vlm.experiments.ocr_heads.data import haystack
from hooked_vlm.experiments.ocr_heads.examples import Evidence, Example
from hooked_vlm.experiments.ocr_heads.reading import Copy
from hooked_vlm.experiments.ocr_heads.scoring import find_copies, find_retrievals
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.layouts import whole_layout
from hooked_vlm.inputs.text import TextCodec
from hooked_vlm.inputs.token_layout import Visual

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen2's tokenizer cuts words, each with the space in front of it."""
FORMS = ("{}", "The pass key is {}.", "It is made of {}.", "The gate of Esk is made of {}", "({})", "It is {}!\n")
ANSWERS = ("granite", "red granite", "7492", "a3z", "a", "blue marble and 12 oaks", "é")


@lru_cache
def tokenizer() -> Any:
    """A byte-level tokenizer trained on the spot."""
    made = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(QWEN), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    words = [*haystack.COLOURS, *haystack.MATERIALS, "granite", "marble", "oaks"]
    texts = words * 50 + [f" {word}" for word in words] * 50 + [form.format("granite") for form in FORMS] * 50
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    """A model with this tokenizer; only its texts are used."""
    own = own_copy(tiny_model("qwen2-vl"))
    own.tokenizer = tokenizer()
    return own


def in_a_row(n: int) -> ImageLayout:
    """A picture of one row, one pixel and one token for each character."""
    return whole_layout((n, 1), (1, 1, n), patch_size=1, merge_size=1)


def batch(tokens: list[int]) -> VLMInputs:
    return VLMInputs(torch.tensor([tokens]), tiny_model("qwen2-vl").input_spec())


@pytest.fixture
def copies_of(model: HookedVLM) -> Callable[..., list[Copy]]:
    """Copies of an answer whose characters have a box each, in image tokens 0, 1, ..."""

    def find(answer: str, reply: str, protocol: Protocol) -> list[Copy]:
        evidence = tuple(
            Evidence(i, i + 1, 0, (i, 0, i + 1, 1)) for i, character in enumerate(answer) if character != " "
        )
        inputs = batch([5] * 100 + ids(reply))
        object.__setattr__(
            inputs, "visuals", (Visual("image", 0, 0, ((0, len(answer)),), (1, 1, len(answer)), in_a_row(len(answer))),)
        )
        example = Example("What is it made of?", (answer,), evidence=evidence)
        return find_copies(model, inputs, 0, example, ids(reply), protocol=protocol)

    return find


Copies = Callable[..., list[Copy]]


def test_the_tokenizer_cuts_words_in_a_sentence_otherwise() -> None:
    assert ids("granite") != ids("It is made of granite.")[-2:-1] and len(ids("It is made of granite.")) < 10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_every_part_of_a_right_answer_is_a_copy(answer: str, form: str, model: HookedVLM, copies_of: Copies) -> None:
    copies = copies_of(answer, form.format(answer), Protocol())
    assert copies and all(copy.position is not None for copy in copies)
    evidence = sorted({token for copy in copies for token in copy.evidence})
    assert evidence == [i for i, character in enumerate(answer) if character != " "]
    tokens, begin = ids(form.format(answer)), 100
    for copy in copies:  # each is held against the characters of the token that follows its position
        assert copy.position is not None
        written = str(model.to_string([tokens[copy.position + 1 - begin]]))
        shown = "".join(answer[token] for token in copy.evidence)
        assert shown.strip(" ") in written or "�" in written


def test_what_is_not_said_is_not_copied(model: HookedVLM, copies_of: Copies) -> None:
    half = copies_of("red granite", "It is granite.", Protocol())
    assert [copy.position is not None for copy in half].count(True) == 1
    assert any(copy.position is None and copy.evidence[0] == 0 for copy in half)
    assert all(copy.position is None for copy in copies_of("granite", "marble, 12", Protocol()))
    longer = copies_of("a3z", "It is a3zq", Protocol())  # a token with another letter is another word
    tokens = ids("It is a3zq")
    for copy in longer:
        if copy.position is not None:
            assert "q" not in str(model.to_string([tokens[copy.position + 1 - 100]]))


def test_the_code_counts_what_it_counted(copies_of: Copies) -> None:
    """By token ids: inside a sentence it finds none of a one-word answer."""
    assert [copy.position for copy in copies_of("granite", "It is made of granite.", OFFICIAL_CODE)].count(None) > 0
    assert all(copy.position is not None for copy in copies_of("7", "7", OFFICIAL_CODE))


@pytest.mark.parametrize("text", ["", "é", "a é", "日本 語", "x" * 40])
def test_the_tokens_of_a_reply_share_its_characters(text: str) -> None:
    found = align(tokenizer(), text, ids(text))
    covered = {i for a, b in found.spans.values() for i in range(a, b)}
    assert covered == set(range(len(text)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("answer", ["granite", "red granite", "blue marble and 12 oaks"])
def test_a_perfect_retrieval_head_scores_one(
    answer: str, form: str, model: HookedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that attends to the needle's own tokens whenever it generates one of them."""
    context = f"The gate of Esk is made of {answer} these days. What is it made of? "
    encoded = tokenizer()(context, add_special_tokens=False, return_offsets_mapping=True)
    prompt, offsets = encoded["input_ids"], [tuple(span) for span in encoded["offset_mapping"]]
    reply = ids(form.format(answer))
    monkeypatch.setattr(TextCodec, "prompt_with_spans", lambda self, text, chat: (prompt, offsets))
    monkeypatch.setattr(HookedVLM, "chat_text", lambda self, text: text)
    example = Example("What is it made of?", (answer,), context=context, answer_at=context.index(answer))
    copies = find_retrievals(model, batch([*prompt, *reply]), 0, example, reply)
    assert sum(copy.weight for copy in copies if copy.position is not None) == pytest.approx(1.0)
    needle = set().union(*(copy.evidence for copy in copies))
    written = "".join(str(model.to_string([prompt[i]])) for i in sorted(needle))
    assert answer in written
