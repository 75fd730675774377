"""Text to token ids and back, with the checkpoint's tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.prompt_styles import STYLES, PromptStyle
from hooked_vlm.inputs.vlm_inputs import VLMInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""The characters a <= i < b of a text."""


@dataclass(frozen=True, eq=False)
class TextCodec:
    """Encode and decode text with a model's tokenizer.

    Raises:
        InputError: (methods that need a tokenizer) the model has none.
    """

    cfg: VLMConfig
    tokenizer: "PreTrainedTokenizerBase | None"

    def require_tokenizer(self) -> Any:
        """The tokenizer, which must be there."""
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: pass token ids, or set model.tokenizer")
        return self.tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands.

        Raises:
            InputError: the tokenizer fails on this text.
        """
        return self._encoded(text, special=False)["input_ids"]

    def encode_prompt(self, text: str, chat: bool) -> list[int]:
        """Token ids of a prompt; `chat`: it is a chat that a template rendered.

        Raises:
            InputError: the tokenizer fails on this text.
        """
        return self._encoded(text, self.adds_own_tokens(text, chat))["input_ids"]

    def prompt_with_spans(self, text: str, chat: bool) -> tuple[list[int], list[tuple[int, int]]] | None:
        """As `encode_prompt`, and each token's span of characters; None if the tokenizer does not report spans.

        Raises:
            InputError: the tokenizer fails on this text.
        """
        if not self.require_tokenizer().is_fast:
            return None
        encoded = self._encoded(text, self.adds_own_tokens(text, chat), return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def adds_own_tokens(self, text: str, chat: bool) -> bool:
        """Whether the tokenizer adds its own tokens (beginning of text) to a prompt: the one place that decides it.

        To a rendered chat it does what the checkpoint's processor does: `transformers`' processors
        (processing_utils.py, `apply_chat_template`) and the published InternVL code add them, unless the template
        wrote the token; `transformers`' tokenizers, which render the chats of text-only checkpoints, never do. Text
        without a template is taken as it stands, and so is a prompt of a style without chats.
        """
        if not chat or self.cfg.vision is None or self.style.plain:
            return False
        first = self.require_tokenizer().bos_token
        return first is None or not text.startswith(first)

    def _encoded(self, text: str, special: bool, **options: Any) -> Any:
        tokenizer = self.require_tokenizer()
        try:
            return tokenizer(text, add_special_tokens=special, **options)
        except Exception as error:  # the tokenizers library has no error class of its own
            raise InputError(f"the checkpoint's tokenizer cannot read {text[:80]!r}: {error}") from error

    def to_string(self, tokens: Any) -> str | list[str]:
        """Decode token ids [pos] to a text, or [batch, pos] to a list; special tokens are kept."""
        ids = tokens.tokens if isinstance(tokens, VLMInputs) else torch.as_tensor(tokens)
        ids = ids if ids.numel() else ids.long()  # an empty list has no type
        if ids.ndim <= 1:
            return self._decode(ids.reshape(-1))
        return [self._decode(row) for row in ids]

    def _decode(self, ids: Int[Tensor, "pos"]) -> str:
        return self.require_tokenizer().decode(ids.tolist(), clean_up_tokenization_spaces=False)

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token.

        Raises:
            InputError: it is none or several, which are shown.
        """
        ids = self.encode(string)
        if len(ids) != 1:
            raise InputError(f"{string!r} is {len(ids)} tokens, not one: {[self.to_string([i]) for i in ids]}")
        return ids[0]

    # ---------------------------------------------------------------- special tokens

    @property
    def pad_ids(self) -> list[int]:
        """Padding tokens: the configuration's first, then the tokenizer's if it is another."""
        ids = [self.cfg.pad_token_id, getattr(self.tokenizer, "pad_token_id", None)]
        known = [i for i in ids if i is not None and i < self.cfg.d_vocab]
        return list(dict.fromkeys(known)) or [*self.cfg.eos_token_ids, 0][:1]

    @property
    def image_token(self) -> str:
        """The text of an image's placeholder."""
        return self._token_text(self.cfg.image_token_id)

    @property
    def video_token(self) -> str:
        """The text of a video's placeholder."""
        return self._token_text(self.cfg.video_token_id)

    @property
    def style(self) -> PromptStyle:
        """The marks of the family's prompts."""
        return STYLES[self.cfg.prompt_style]

    def marked(self, placeholder: str) -> str:
        """A placeholder between the tokens that open and close a picture and the text around them, where the family
        has such."""
        ids = (self.cfg.vision_start_token_id, self.cfg.vision_end_token_id)
        start, end = ("" if token_id is None else self._token_text(token_id) for token_id in ids)
        before, behind = self.style.around_image
        return f"{before}{start}{placeholder}{end}{behind}"

    def with_placeholders(self, text: str) -> str:
        """A text in which the placeholder of each image, with what stands around it, is in the place of its slot.

        A text that has placeholders is taken as it stands.
        """
        slot = self.style.image_slot
        if slot is None or self.cfg.vision is None or self.image_token in text:
            return text
        return text.replace(slot, self.marked(self.image_token))

    def _token_text(self, token_id: int | None) -> str:
        return "\0" if token_id is None else self.require_tokenizer().convert_ids_to_tokens(token_id)

    def special_id(self, token: str) -> int | None:
        """The id of a special token; None if the vocabulary does not have it."""
        if self.tokenizer is None:
            return None
        tokenizer = self.require_tokenizer()
        token_id = tokenizer.convert_tokens_to_ids(token)  # the unknown token's id if there is no such token
        known = token_id is not None and tokenizer.convert_ids_to_tokens(token_id) == token
        return token_id if known else None


def check_ids(tokens: Int[Tensor, "batch pos"], d_vocab: int) -> None:
    """Refuse an empty batch and ids outside the vocabulary.

    Raises:
        InputError: either of these.
    """
    if tokens.numel() == 0:
        raise InputError("there are no tokens: the prompt is empty")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of {d_vocab}")


def token_spans(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, list[Span]]:
    """Decode tokens: their text, and the characters of each. Tokens that are parts of a character all have it."""

    def decoded(n: int) -> str:
        return tokenizer.decode(list(tokens[:n]), clean_up_tokenization_spaces=False)

    text = decoded(len(tokens))
    ends = [0]
    for n in range(1, len(tokens) + 1):
        ends.append(max(ends[-1], _common_prefix(decoded(n), text)))
    return text, [(a, max(b, min(a + 1, len(text)))) for a, b in pairwise(ends)]


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
