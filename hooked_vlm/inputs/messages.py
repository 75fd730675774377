"""Prompts as users give them: lists of pictures, chat messages with pictures inside."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from hooked_vlm.errors import InputError

Messages = Sequence[Mapping[str, Any]]
"""A chat as Hugging Face's templates take it: [{"role": "user", "content": [{"type": "image"}, ...]}]."""


def as_prompts(prompt: Any) -> tuple[list[Any], bool]:
    """A list of prompts, and whether a list was given.

    Raises:
        InputError: the list is empty, or something is neither a text nor chat messages.
    """
    if isinstance(prompt, str):
        return [prompt], False
    if not isinstance(prompt, list | tuple) or not all(isinstance(p, str | Mapping | list | tuple) for p in prompt):
        raise InputError(f"a prompt is a text, a list of chat messages, or a list of such prompts, got {prompt!r}")
    if not prompt:
        raise InputError("there are no prompts: the list is empty")
    return ([prompt], False) if isinstance(prompt[0], Mapping) else (list(prompt), True)


def per_prompt(given: Any, n: int, batched: bool, name: str, as_list: Callable[[Any], list]) -> list[list]:
    """A list of pictures for each of the `n` prompts.

    Raises:
        InputError: not one entry for each prompt.
    """
    if given is None:
        return [[] for _ in range(n)]
    if not batched:
        return [as_list(given)]
    if not isinstance(given, list | tuple) or len(given) != n:
        count = len(given) if isinstance(given, list | tuple) else 1
        raise InputError(f"{n} prompts need {n} entries in {name} (None where a prompt has none), got {count}")
    return [[] if one is None else as_list(one) for one in given]


def _is_picture(x: Any) -> bool:
    return isinstance(x, str | Path | Image.Image | np.ndarray | Tensor)


def as_images(given: Any) -> list:
    """A list of pictures; one picture is a list of one.

    Raises:
        InputError: neither of these.
    """
    if not _is_picture(given) and not isinstance(given, Iterable):
        raise InputError(f"images must be a picture or a list of pictures, got {given!r}")
    return [given] if _is_picture(given) else list(given)


def as_videos(given: Any) -> list:
    """A list of videos; a flat list of frames is one video.

    Raises:
        InputError: neither of these.
    """
    if not isinstance(given, Iterable):
        raise InputError(f"videos must be a list of frames, or a list of such lists, got {given!r}")
    given = list(given)
    return [given] if given and _is_picture(given[0]) else [list(video) for video in given]


def take_pictures(messages: Messages) -> tuple[list[dict], list, list]:
    """The messages with bare placeholders, and the images and videos that they carried.

    Raises:
        InputError: something is not a chat message.
    """
    pictures: dict[str, list] = {"image": [], "video": []}
    bare = []
    for message in messages:
        content = _checked(message)["content"]
        if not isinstance(content, str):
            for part in content:
                kind = part.get("type")
                if kind in ("image", "video") and part.get(kind) is not None:
                    pictures[kind].append(part[kind])
            content = [{"type": p["type"]} if p.get("type") in ("image", "video") else p for p in content]
        bare.append({**message, "content": content})
    return bare, pictures["image"], pictures["video"]


def _checked(message: Any) -> Mapping[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f'a chat message is {{"role": ..., "content": ...}}, got {message!r}')
    if not isinstance(message.get("role"), str) or "content" not in message:
        raise InputError(f"a chat message needs 'role' and 'content', got {sorted(map(str, message))}")
    content = message["content"]
    if not isinstance(content, Sequence) or not (isinstance(content, str) or all(map(_is_part, content))):
        raise InputError(
            'a message\'s content is a text or a list of {"type": "text", "text": ...} and {"type": "image"}, '
            f"got {content!r}"
        )
    return message


def _is_part(part: Any) -> bool:
    return isinstance(part, Mapping) and (part.get("type") != "text" or isinstance(part.get("text"), str))
