"""Tiny Gemma 3 and PaliGemmas with a tokenizer, as `from_pretrained` would make them."""

from functools import lru_cache
from string import printable
from typing import Any

from families import KINDS
from prompt_templates import GEMMA3
from tiny_gemma3 import IMAGE, OPENS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hooked_vlm import HookedVLM

MARKS = ("<start_of_turn>", "<end_of_turn>", "<loc0012>", "<seg003>")
OF_IMAGES = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


def tokenizer(image: str) -> Any:
    """Letter by letter, line breaks together, spaces as ▁ and none put in front of a text, as Gemma's.

    Args:
        image: the placeholder of an image's tokens.
    """
    breaks = ["\n" * n for n in range(1, 6)]
    letters = dict.fromkeys(c for c in printable if not c.isspace())
    known = ["<pad>", "<bos>", "<unk>", "<eos>", *MARKS, "▁", *letters, *breaks]
    known += [f"<unused{i}>" for i in range(OPENS - len(known))]
    vocab = {token: i for i, token in enumerate([*known, "<start_of_image>", "<end_of_image>", image])}
    assert vocab[image] == IMAGE
    merges = [("\n" * n, "\n") for n in range(1, 5)] + [("\n", "\n" * n) for n in range(2, 5)]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    names = {name: f"<{name.removesuffix('_token')}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=made,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={**OF_IMAGES, "image_token": image},
        **names,
    )
    wrapped.add_special_tokens({"additional_special_tokens": [*MARKS[:2]]}, replace_extra_special_tokens=False)
    wrapped.add_tokens([*MARKS[2:]])
    return wrapped


@lru_cache
def reading(family: str) -> Any:
    """The tiny model of a family. Shared."""
    known = tokenizer("<image_soft_token>" if family == "gemma3" else "<image>")
    if family == "gemma3":
        known.chat_template = GEMMA3
    return HookedVLM.from_hf(KINDS[family].hf(), known)
