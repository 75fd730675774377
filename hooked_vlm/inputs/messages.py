"""Prompts as users give them: lists of pictures, chat messages with pictures inside."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from hooked_vlm.errors import ImageError, InputError
from hooked_vlm.inputs.files import from_base64, is_file_source
from hooked_vlm.inputs.images import is_picture
from hooked_vlm.inputs.picture_settings import IMAGE_SETTINGS, VIDEO_SETTINGS, PictureSettings
from hooked_vlm.inputs.videos import is_video

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


def as_images(given: Any) -> list:
    """A list of pictures; one picture is a list of one.

    Raises:
        InputError: neither of these.
    """
    if not is_picture(given) and not isinstance(given, Iterable):
        raise InputError(f"images must be a picture or a list of pictures, got {given!r}")
    return [given] if is_picture(given) else list(given)


def as_videos(given: Any) -> list:
    """A list of videos; one file, one 4-D array, or a flat list of frames is one video.

    Raises:
        InputError: neither of these, or frames and videos in one list.
    """
    if is_file_source(given) or isinstance(given, np.ndarray | Tensor):
        return [given]
    if not isinstance(given, Iterable):
        raise InputError(f"videos must be a video (frames, an array, a file) or a list of videos, got {given!r}")
    given = list(given)
    videos = [is_video(one) for one in given]
    if any(videos) and not all(videos):
        raise InputError(f"videos must be all videos or all frames of one, but entry {videos.index(False)} is a frame")
    return given if all(videos) else [given]


# ---------------------------------------------------------------- chat messages

_SOURCES = {
    "image": ("image", "url", "path", "base64", "image_url"),
    "video": ("video", "url", "path", "base64", "video_url"),
}
"""Where a part may carry its picture: the names in Qwen's, `transformers`' and OpenAI's messages."""
_SETTINGS = {"image": IMAGE_SETTINGS, "video": VIDEO_SETTINGS}
_TYPES = {"text": "text", "image": "image", "image_url": "image", "video": "video", "video_url": "video"}


@dataclass(frozen=True, eq=False)
class Picture:
    """An image or video of a prompt, with the settings that its message gives it."""

    source: Any
    settings: PictureSettings = field(default_factory=PictureSettings)


def take_pictures(messages: Messages) -> tuple[list[dict], list[Picture], list[Picture]]:
    """The messages with bare placeholders, and the images and videos that they carried.

    Raises:
        InputError: something is not a chat message, or has an entry that has no effect here.
    """
    pictures: dict[str, list[Picture]] = {"image": [], "video": []}
    bare = []
    for message in messages:
        content = _checked(message)
        if isinstance(content, list | tuple):
            content = [_bare(part, pictures) for part in content]
        bare.append({**message, "content": content} if "content" in message else dict(message))
    return bare, pictures["image"], pictures["video"]


def _checked(message: Any) -> Any:
    """The content of a message; None in a message of tool calls alone."""
    if not isinstance(message, Mapping):
        raise InputError(f'a chat message is {{"role": ..., "content": ...}}, got {message!r}')
    content = message.get("content")
    if not isinstance(message.get("role"), str) or not ("content" in message or message.get("tool_calls")):
        raise InputError(f"a chat message needs 'role' and 'content', got {sorted(map(str, message))}")
    if content is None and message.get("tool_calls"):
        return None
    parts = isinstance(content, list | tuple) and all(isinstance(part, Mapping) for part in content)
    if not parts and not isinstance(content, str):
        raise InputError(
            'a message\'s content is a text or a list of {"type": "text", "text": ...} and {"type": "image"}, '
            f"got {content!r}"
        )
    return content


def _bare(part: Mapping[str, Any], pictures: dict[str, list[Picture]]) -> dict[str, Any]:
    """The part as a template needs it; its picture goes to `pictures`.

    An entry that is None is not there: `datasets` fills the entries that other parts have with it.
    """
    given = {name: value for name, value in part.items() if value is not None}
    kind = _kind(given)
    if kind == "text":
        if set(given) - {"type", "text"} or not isinstance(given.get("text"), str):
            raise InputError(f'expected a text as {{"type": "text", "text": ...}}, got {dict(part)!r:.300}')
        return {"type": "text", "text": given["text"]}
    sources = [name for name in _SOURCES[kind] if name in given]
    known = {"type", *_SOURCES[kind], *_SETTINGS[kind]}
    if unknown := sorted(map(str, given.keys() - known)):
        raise InputError(f"unknown key {unknown[0]!r} in a message's {kind}: known are {', '.join(sorted(known))}")
    if len(sources) > 1:
        raise InputError(f"got a message's {kind} as {sources[0]} and as {sources[1]}: give it once")
    try:
        settings = PictureSettings.from_part(given, _SETTINGS[kind])
        if sources:
            pictures[kind].append(Picture(_source(given[sources[0]], sources[0]), settings))
    except ImageError as error:
        raise InputError(f"{kind} in a message: {error}") from error
    if not sources and settings != PictureSettings():
        raise InputError(f"a message has settings of its {kind}, but the {kind} is not beside them: put it there")
    return {"type": kind}


def _kind(given: Mapping[str, Any]) -> str:
    """Text, image or video: the type that a part states, or that the name of its only content tells."""
    named = given.get("type")
    if named is None:
        named = next((name for name in _TYPES if name in given), None)
    if not isinstance(named, str) or named not in _TYPES:
        raise InputError(f"a part of a message is a text, an image or a video, got {dict(given)!r:.300}")
    return _TYPES[named]


def _source(value: Any, name: str) -> Any:
    """The picture that a part's entry stands for."""
    if name == "base64":
        return from_base64(value)
    if name in ("image_url", "video_url") and isinstance(value, Mapping):  # OpenAI's form
        if set(value) - {"url", "detail"} or "url" not in value or value.get("detail") not in (None, "auto"):
            raise InputError(f'expected {name} as {{"url": ...}}, got {dict(value)!r:.300}')
        return value["url"]
    return value
