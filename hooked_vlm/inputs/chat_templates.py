"""Chat templates of checkpoints: programs by strangers, run in `transformers`' sandbox and for a bounded time."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hooked_vlm.errors import InputError

SECONDS = 10.0
"""Of computing that a template may take; those of published checkpoints take milliseconds."""


def rendered(tokenizer: Any, messages: Sequence[Any]) -> str:
    """The prompt of a chat, up to where the answer begins.

    The sandbox keeps a template from Python's internals and from files; a loop without end is stopped here, where the
    next line of the template begins. What a single expression computes is not bounded.

    Raises:
        InputError: the template cannot be read or refuses the messages, reaches for what the sandbox forbids, or
            takes too long.
    """
    try:
        with _bounded():
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise whatever they compute
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"the checkpoint's chat template does not take these messages ({reason}): change them, or pass chat=False "
            "and the text as it should stand"
        ) from error


@contextmanager
def _bounded() -> Iterator[None]:
    """Look at the clock at every line of a template."""
    before, end = sys.gettrace(), time.thread_time() + SECONDS

    def at_line(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > end:
            raise TimeoutError(f"it computes for more than {SECONDS:g} seconds")
        return at_line

    def at_call(frame: FrameType, event: str, argument: Any) -> Any:
        return at_line if frame.f_code.co_filename == "<template>" else None  # Jinja's name for compiled templates

    sys.settrace(at_call)
    try:
        yield
    finally:
        sys.settrace(before)
