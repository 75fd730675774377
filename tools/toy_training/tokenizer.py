"""The toy models' tokenizer: one token per character for keys and values, one per prompt word.

A byte-level alphabet makes the round trip lossless for any text. The prompt's words are whole entries
of the vocabulary and no merges exist: with ``ignore_merges`` a piece of text (letters and digits, with
the space before them) is one token if it *is* a word of the vocabulary and falls apart into characters
otherwise, so ``is`` never hides inside a value such as ``is3k``. ``" = "`` is one token too: a value then
starts two positions after its key's last letter, and small decoders learn to find it; with three tokens
in between they did not.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from hooked_vlm.runtime.files import atomic_write
from hooked_vlm.toys.drawings import OBJECTS

# The special tokens of both families; each adds those of its images.
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

WORDS = (
    "user", "system", "assistant", "What", " is", " the", " value", " of",
    " main", " object", " in", " image", "Read", " text", *OBJECTS, " = ",
)  # fmt: skip


def build_tokenizer(special_tokens: Sequence[str]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(word.replace(" ", "Ġ") for word in WORDS)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" = | ?[A-Za-z0-9]+|[^A-Za-z0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special_tokens])
    return tokenizer


def save_tokenizer(folder: Path, special_tokens: Sequence[str], **settings: str) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` (with ``settings`` besides the usual ones)."""
    text = build_tokenizer(special_tokens).to_str(pretty=True)
    atomic_write(folder / "tokenizer.json", lambda aside: aside.write_text(text, encoding="utf-8"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": list(special_tokens[1:]),
        **settings,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "padding_side": "left",
    }
    written = json.dumps(config, indent=2) + "\n"
    atomic_write(folder / "tokenizer_config.json", lambda aside: aside.write_text(written))
