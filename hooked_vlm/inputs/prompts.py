"""Prompts as text with one placeholder per picture, and as token ids with all placeholders."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, TemplateError

from hooked_vlm.errors import InputError
from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.inputs.messages import Messages, Picture, take_pictures
from hooked_vlm.inputs.templates import IMAGE_SLOT, render_with_tokenizer, template_named
from hooked_vlm.inputs.text import TextCodec
from hooked_vlm.inputs.token_layout import InputSpec

_OF_RENDERING = ("add_generation_prompt", "chat_template", "continue_final_message")
"""Arguments of `apply_chat_template` that act on every template."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """The text of one prompt, and its pictures in the order of their placeholders."""

    text: str
    images: list[Picture]
    videos: list[Picture]


def read_prompt(
    prompt: str | Messages,
    images: list,
    videos: list,
    codec: TextCodec,
    chat: bool,
    template: Mapping[str, Any] | None = None,
) -> Prompt:
    """Apply the chat template to a prompt, or with chat=False take a text as it stands.

    Args:
        template: arguments of the chat template.

    Raises:
        InputError: pictures came twice, there is no template, it refuses the messages or has no use for an argument.
    """
    images, videos = ([Picture(source) for source in sources] for sources in (images, videos))
    named = chat and codec.cfg.chat_template is not None
    plain = chat and codec.style.plain and getattr(codec.tokenizer, "chat_template", None) is None
    if template and (named or plain or not chat):
        why = "the template that config.json names takes none" if named else "chat=False applies no template"
        why = "this model has none" if plain else why
        raise InputError(f"got arguments for the chat template ({', '.join(map(str, template))}), but {why}")
    if named:
        return _by_named_template(prompt, images, videos, codec)
    if plain:
        return _without_chat(prompt, images, videos, codec)
    if isinstance(prompt, str) and not chat:
        prompt = codec.with_placeholders(prompt)
        missing = "" if codec.image_token in prompt else codec.marked(codec.image_token) * len(images)
        missing += "" if codec.video_token in prompt else codec.marked(codec.video_token) * len(videos)
        return Prompt(missing + prompt, images, videos)
    if isinstance(prompt, str):
        content = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
        prompt = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    messages, images, videos = _with_pictures(prompt, images, videos)
    if codec.cfg.vision is None:
        messages = [_as_text(message) for message in messages]
    text = _render(messages, codec.require_tokenizer(), template or {})
    return Prompt(codec.with_placeholders(text), images, videos)


def _without_chat(prompt: str | Messages, images: list[Picture], videos: list[Picture], codec: TextCodec) -> Prompt:
    """The pictures, then the text between the headers of question and answer.

    A text may have the placeholders of its pictures, of which the last ends them.

    Raises:
        InputError: something else than one message by the user.
    """
    if not isinstance(prompt, str):
        messages, images, videos = _with_pictures(prompt, images, videos)
        roles = [message["role"] for message in messages]
        if roles != ["user"]:
            raise InputError(
                f"this model has no chats: give one message by the user, got {', '.join(map(repr, roles))} (an answer "
                "follows with inputs.append(...))"
            )
        _refuse_unread(_keys_of(messages))
        content = messages[0]["content"]
        prompt = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    before, placeholder, text = prompt.rpartition(codec.image_token)
    pictures = before + placeholder if placeholder else codec.image_token * len(images)
    return Prompt(pictures + codec.style.user_header + text + codec.style.assistant_header, images, videos)


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message for a language model alone, whose template takes a content as a string, not as a list of parts.

    Raises:
        InputError: a picture; several parts: whether something stands between them is the writer's to say.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if kinds := sorted({part["type"] for part in content} - {"text"}):
        raise InputError(f"this model takes no {kinds[0]}s: it has no vision tower")
    if len(content) != 1:
        raise InputError(f"this model takes the content of a message as one text, got {len(content)} parts: join them")
    return {**message, "content": content[0]["text"]}


def _render(messages: list[dict[str, Any]], tokenizer: Any, arguments: Mapping[str, Any]) -> str:
    """The chat in the tokenizer's own template.

    Raises:
        InputError: there is no template, it fails, does not read an argument or a key of a message, or prints a list
            of parts.
    """
    template = arguments.get("chat_template") or getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str | Mapping):
        raise InputError("this tokenizer has no chat template: pass chat=False and the text as it should stand")
    read = {*_OF_RENDERING, *_names_in(template)}
    _refuse_unread({*arguments} - read)
    _refuse_unread(_keys_of(messages) - read)
    text = render_with_tokenizer(tokenizer, messages, **arguments)
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and content and str(content) in text:
            raise InputError(
                "the checkpoint's chat template takes a content as a text, and prints a list of parts as such: give "
                "messages with texts, or pass chat=False and the text as it should stand"
            )
    return text


def _names_in(template: str | Mapping[str, str]) -> set[str]:
    """Every name and every string in the code of a template (of several templates, any of them)."""
    texts = [template] if isinstance(template, str) else template.values()
    try:
        tokens = [(kind, value) for text in texts for _, kind, value in Environment().lex(text)]
    except TemplateError as error:
        raise InputError(f"the checkpoint's chat template cannot be parsed ({error}): pass chat=False") from error
    return {value.strip("'\"") for kind, value in tokens if kind in ("name", "string")}


def _keys_of(messages: list[dict[str, Any]]) -> set[str]:
    """Keys of messages beside role and content; one that is None is not there."""
    return {str(key) for message in messages for key in message if message[key] is not None} - {"role", "content"}


def _refuse_unread(names: set[str]) -> None:
    if names:
        raise InputError(f"this model's chat template does not read {min(names)!r}: it would have no effect")


def _by_named_template(
    prompt: str | Messages, images: list[Picture], videos: list[Picture], codec: TextCodec
) -> Prompt:
    """Apply the conversation template that the checkpoint's configuration names."""
    template = template_named(str(codec.cfg.chat_template))
    if isinstance(prompt, str):
        slots = "" if IMAGE_SLOT in prompt else f"{IMAGE_SLOT}\n" * len(images)
        prompt = [{"role": "user", "content": slots + prompt}]
    messages, images, videos = _with_pictures(prompt, images, videos)
    _refuse_unread(_keys_of(messages))
    text = template.render(messages, codec.cfg.system_message)
    if (n_slots := text.count(IMAGE_SLOT)) != len(images):
        raise InputError(
            f"the prompt has {n_slots} {IMAGE_SLOT} but got {len(images)} images: write one for each image, or none "
            "to put them in front"
        )
    return Prompt(text.replace(IMAGE_SLOT, codec.marked(codec.image_token)), images, videos)


def _with_pictures(
    messages: Messages, images: list[Picture], videos: list[Picture]
) -> tuple[list[dict], list[Picture], list[Picture]]:
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
    runs: dict[int | None, Iterator[int]],
    spec: InputSpec,
) -> Iterator[int]:
    """Repeat every placeholder to the length of its run.

    The tokens that open and close a picture are added where a template leaves them out (transformers' InternVL).

    Args:
        runs: for each placeholder id, the lengths of the runs still to come.
    """
    start, end = spec.vision_start_token_id, spec.vision_end_token_id
    for at, token in enumerate(ids):
        if token not in runs:
            yield token
            continue
        unmarked = spec.style.adds_marks and start is not None and (at == 0 or ids[at - 1] != start)
        if unmarked and start is not None:
            yield start
        yield from [token] * next(runs[token])
        if unmarked and end is not None:
            yield end


def with_runs(text: str, placeholder: str, marked: str, layouts: Sequence[ImageLayout]) -> str:
    """Write the placeholder of each run, and the texts between runs, in place of the placeholder of each picture.

    Args:
        marked: the placeholder between the tokens that open and close a picture: those around a picture's placeholder
            become those of each of its runs.
    """
    if not any(layout.between for layout in layouts):
        return text
    opens, closes = marked.split(placeholder)
    pieces = text.split(placeholder)
    written = [pieces[0]]
    for layout, following in zip(layouts, pieces[1:], strict=True):
        if not layout.between:
            written += [placeholder, following]
            continue
        written[-1] = written[-1].removesuffix(opens)
        written += [marked.join(layout.between), following.removeprefix(closes)]
    return "".join(written)
