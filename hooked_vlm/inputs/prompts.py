"""Prompts as text with one placeholder per picture, and as token ids with all placeholders."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.messages import Messages, take_pictures
from hooked_vlm.inputs.templates import IMAGE_SLOT, render_with_tokenizer, template_named
from hooked_vlm.inputs.text import TextCodec
from hooked_vlm.inputs.token_layout import Grid, InputSpec


@dataclass(frozen=True, eq=False)
class Prompt:
    """The text of one prompt, and its pictures in the order of their placeholders."""

    text: str
    images: list[Any]
    videos: list[Any]


def read_prompt(prompt: str | Messages, images: list, videos: list, codec: TextCodec, chat: bool) -> Prompt:
    """Apply the chat template to a prompt, or with chat=False take a text as it stands.

    Raises:
        InputError: pictures came twice, there is no template, or it refuses the messages.
    """
    if chat and codec.cfg.chat_template is not None:
        return _by_named_template(prompt, images, videos, codec)
    if isinstance(prompt, str) and not chat:
        missing = "" if codec.image_token in prompt else codec.marked(codec.image_token) * len(images)
        missing += "" if codec.video_token in prompt else codec.marked(codec.video_token) * len(videos)
        return Prompt(missing + prompt, images, videos)
    if isinstance(prompt, str):
        content = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
        prompt = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    messages, images, videos = _with_pictures(prompt, images, videos)
    tokenizer = codec.require_tokenizer()
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("this tokenizer has no chat template: pass chat=False and the text as it should stand")
    return Prompt(render_with_tokenizer(tokenizer, messages), images, videos)


def _by_named_template(prompt: str | Messages, images: list, videos: list, codec: TextCodec) -> Prompt:
    """Apply the conversation template that the checkpoint's configuration names."""
    template = template_named(str(codec.cfg.chat_template))
    if isinstance(prompt, str):
        slots = "" if IMAGE_SLOT in prompt else f"{IMAGE_SLOT}\n" * len(images)
        prompt = [{"role": "user", "content": slots + prompt}]
    messages, images, videos = _with_pictures(prompt, images, videos)
    text = template.render(messages, codec.cfg.system_message)
    if (n_slots := text.count(IMAGE_SLOT)) != len(images):
        raise InputError(
            f"the prompt has {n_slots} {IMAGE_SLOT} but got {len(images)} images: write one for each image, or none "
            "to put them in front"
        )
    return Prompt(text.replace(IMAGE_SLOT, codec.marked(codec.image_token)), images, videos)


def _with_pictures(messages: Messages, images: list, videos: list) -> tuple[list[dict], list, list]:
    """The messages with bare placeholders, and the pictures from them or from the arguments."""
    bare, inline_images, inline_videos = take_pictures(messages)
    if (inline_images and images) or (inline_videos and videos):
        raise InputError("got pictures both in the messages and as an argument: give them in one place")
    return bare, images or inline_images, videos or inline_videos


# ---------------------------------------------------------------- token ids


def check_placeholders(ids: list[int], row: int, n_images: int, n_videos: int, spec: InputSpec) -> None:
    """Check that a prompt has one placeholder for each of its pictures.

    Raises:
        InputError: their numbers differ.
    """
    for kind, token_id, n in (("image", spec.image_token_id, n_images), ("video", spec.video_token_id, n_videos)):
        n_placeholders = ids.count(token_id) if token_id is not None else 0
        if n_placeholders != n:
            raise InputError(
                f"prompt {row} has {n_placeholders} {kind} placeholder{'s' * (n_placeholders != 1)} but got {n} "
                f"{kind}{'s' * (n != 1)}: give one {kind} for each placeholder"
            )


def expand_placeholders(
    ids: list[int],
    grids: dict[int | None, Iterator[Grid]],
    spec: InputSpec,
    marks: tuple[int | None, int | None],
) -> Iterator[int]:
    """Repeat every placeholder to the number of tokens of its picture.

    Args:
        grids: for each placeholder id, the grids of the pictures still to come.
        marks: the tokens that open and close a picture. transformers' InternVL templates leave both out; they are
            added here.
    """
    start, end = marks
    for at, token in enumerate(ids):
        if token not in grids:
            yield token
            continue
        unmarked = spec.tile_size is not None and start is not None and (at == 0 or ids[at - 1] != start)
        if unmarked and start is not None:
            yield start
        yield from [token] * spec.n_tokens(next(grids[token]))
        if unmarked and end is not None:
            yield end
