"""Laws of the toy tasks' generators and tokenizer."""

import string
from typing import Any

import numpy as np
import pytest

from hooked_vlm.toys import pages as data
from hooked_vlm.toys.drawings import OBJECTS
from tools.toy_training.batches import encode
from tools.toy_training.families import FAMILIES
from tools.toy_training.family import ToyFamily
from tools.toy_training.tokenizer import END_OF_TEXT, WORDS, build_tokenizer

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("seed", range(12))
def test_a_characters_box_holds_exactly_its_ink(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the same page without one value character changes pixels inside its box and nowhere else."""
    page = data.make_page(generator(seed))
    line_index = seed % len(page.lines)
    line = page.lines[line_index]
    real = data.draw_text
    for position, box in enumerate(line.value_boxes):
        drawn: list[str] = []

        def skipping(
            coverage: np.ndarray, *args: Any, drawn: list[str] = drawn, character: int = position
        ) -> list[data.Box]:
            before = coverage.copy()
            boxes = real(coverage, *args)
            if len(drawn) == line_index:
                x0, y0, x1, y1 = boxes[character - data.VALUE_LENGTH]
                coverage[y0:y1, x0:x1] = before[y0:y1, x0:x1]
            drawn.append("one line")
            return boxes

        with monkeypatch.context() as patched:
            patched.setattr(data, "draw_text", skipping)
            without = data.make_page(generator(seed))
        changed = np.abs(page.pixels.astype(int) - without.pixels.astype(int)).max(-1) > 0
        x0, y0, x1, y1 = box
        assert changed[y0:y1, x0:x1].any(axis=0).mean() > 0.5, "the box must be filled with ink"
        assert changed.sum() == changed[y0:y1, x0:x1].sum()


def test_the_ink_in_a_box_is_the_characters_glyph() -> None:
    page = data.make_page(generator(3), n_lines=4)
    for line in page.lines:
        for char, (x0, y0, x1, y1) in zip(line.value, line.value_boxes, strict=True):
            darkness = 255 - page.pixels[y0:y1, x0:x1].mean(-1)
            fits = {}
            for candidate in data.CHARACTERS:
                for size in range(9, 17):
                    ink = data.glyph(candidate, size)[0]
                    if ink.shape == darkness.shape:
                        correlation = np.corrcoef(ink.ravel(), darkness.ravel())[0, 1]
                        fits[candidate] = max(fits.get(candidate, -1), correlation)
            assert max(fits, key=lambda c: fits[c]) == char or fits[char] > 0.97


def test_boxes_lie_on_the_page_and_run_left_to_right() -> None:
    for seed in range(100):
        page = data.make_page(generator(seed))
        height, width, _ = page.pixels.shape
        for line in page.lines:
            boxes = [*line.key_boxes, *line.value_boxes]
            assert len(line.value_boxes) == len(line.value) == data.VALUE_LENGTH
            assert all(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height for x0, y0, x1, y1 in boxes)
            assert [b[0] for b in boxes] == sorted(b[0] for b in boxes)
            assert line.value_box == data.union(line.value_boxes)
        tops = [line.value_box[1] for line in page.lines]
        assert tops == sorted(tops)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_page() -> None:
    makers = (data.page_sample, data.text_sample, data.transcription_sample, data.naming_sample)
    for make in makers:
        first, again, other = make(generator(5)), make(generator(5)), make(generator(6))
        assert first.turns == again.turns
        if first.pixels is not None and again.pixels is not None:
            assert first.pixels.tobytes() == again.pixels.tobytes()
            assert other.pixels is not None and first.pixels.tobytes() != other.pixels.tobytes()


def test_pages_take_given_lines_sizes_and_fonts() -> None:
    lines = (data.Line("ab", "1234"), data.Line("cd", "wxyz"))
    page = data.make_page(generator(0), lines=lines, size=(144, 96), font_size=12)
    assert page.pixels.shape == (96, 144, 3)
    assert page.text == "ab = 1234\ncd = wxyz"
    assert page.question(1) == "What is the value of cd?"


def test_questions_ask_for_lines_of_the_page_and_answers_are_their_values() -> None:
    for make in (data.page_sample, data.text_sample):
        for seed in range(20):
            sample = make(generator(seed), turns=3)
            for (question, answer), index in zip(sample.turns, sample.target_lines, strict=True):
                if sample.page is not None:
                    line = sample.page.lines[index]
                    assert question == data.question_for(line.key) and answer == line.value
                else:
                    context = sample.turns[0][0].rsplit("\n", 1)[0].split("\n")
                    key = question.rsplit(" ", 1)[1].rstrip("?")
                    assert f"{key} = {answer}" == context[index]


def test_every_object_is_drawn_with_varying_look() -> None:
    assert len(OBJECTS) >= 8
    for name in OBJECTS:
        drawn = [data.naming_sample(generator(seed), name=name) for seed in range(3)]
        assert len({sample.pixels.tobytes() for sample in drawn if sample.pixels is not None}) == 3
        assert all(sample.turns == ((data.NAMING_PROMPT, name),) for sample in drawn)


def test_printable_text_survives_the_tokenizer() -> None:
    tokenizer = build_tokenizer((END_OF_TEXT,))
    for text in (string.printable, "naïve – 日本", "  What is  the value of ab?\n\n", "is3k = star"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_keys_and_values_are_one_token_per_character() -> None:
    tokenizer = build_tokenizer((END_OF_TEXT,))
    for seed in range(300):
        for line in data.random_lines(generator(seed), 6):
            assert len(tokenizer.encode(line.value).ids) == len(line.value)
            assert len(tokenizer.encode(line.text).ids) == len(line.key) + 1 + len(line.value)
            question = data.question_for(line.key)
            assert len(tokenizer.encode(question).ids) == len(("What", " is", " the", " value", " of", " ", "?")) + len(
                line.key
            )


def test_words_of_the_prompts_are_single_tokens_and_never_hide_in_values() -> None:
    tokenizer = build_tokenizer((END_OF_TEXT,))
    for word in WORDS:
        assert len(tokenizer.encode(word).ids) == 1
    assert len(tokenizer.encode("ab is3k").ids) == len("ab is3k")
    assert {word.strip().lower() for word in WORDS if word != data.SEPARATOR} == data.RESERVED_WORDS


@every_family
def test_a_conversation_encoded_in_pieces_equals_its_text_encoded_whole(family: ToyFamily) -> None:
    for sample in (data.page_sample(generator(1), 4, turns=4), data.text_sample(generator(2), 4, turns=4)):
        tokens, labels = encode(family, sample)
        text = family.tokenizer.decode(tokens, skip_special_tokens=False)
        assert family.tokenizer.encode(text).ids == tokens
        supervised = [token for token, label in zip(tokens, labels, strict=True) if label != -100]
        answers = "".join(answer + "<|im_end|>" for _, answer in sample.turns)
        assert family.tokenizer.decode(supervised, skip_special_tokens=False) == answers


def test_decoys_start_like_another_value_and_go_on_differently() -> None:
    for seed in range(50):
        lines = data.random_lines(generator(seed), 4, decoys=1.0)
        assert [line.key for line in lines] == [line.key for line in data.random_lines(generator(seed), 4)]
        assert all(len(line.value) == data.VALUE_LENGTH for line in lines)
        for index, line in enumerate(lines):
            starts = {other.value[0] for other in lines[:index] + lines[index + 1 :]}
            before = {o.value[0] for o in data.random_lines(generator(seed), 4)}
            assert set(line.value[:-1]) & (starts | before)
