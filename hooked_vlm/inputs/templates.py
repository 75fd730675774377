"""Chat templates: a checkpoint's own, rendered by `transformers`, and InternVL's conversation templates.

InternVL's published layout only names its template; the texts here are those of the published conversation code
(`internvl/conversation.py`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hooked_vlm.config import VLMConfig
from hooked_vlm.errors import InputError
from hooked_vlm.inputs.prompt_styles import STYLES, PromptStyle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_SLOT = "<image>"
"""Stands for an image in a text."""

_SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


@dataclass(frozen=True)
class ChatTemplate:
    """A conversation template: each turn is the header of its role, the message and the separator."""

    system_header: str
    user_header: str
    assistant_header: str
    separator: str
    system_message: str

    @property
    def stop(self) -> str:
        """The token that ends an answer."""
        return self.separator.strip()

    def styled(self, style: PromptStyle) -> PromptStyle:
        """A family's style with the turns of this template."""
        return replace(
            style,
            user_header=self.user_header,
            assistant_header=self.assistant_header,
            turn_starts=(_first_token(self.user_header), _first_token(self.assistant_header)),
            turn_end=self.stop,
            stop=self.stop,
        )

    def render(self, messages: Sequence[Mapping[str, Any]], system_message: str | None = None) -> str:
        """The prompt that asks for the next answer.

        Args:
            messages: a chat; a content is a text, or a list of {"type": "text", "text": ...} and
                {"type": "image"}. A system message in front replaces the template's.
            system_message: replaces the template's own.

        Raises:
            InputError: a role or a part that the template does not support.
        """
        system = self.system_message if system_message is None else system_message
        if messages and messages[0]["role"] == "system":
            system, messages = _text(messages[0]), messages[1:]
        headers = {"user": self.user_header, "assistant": self.assistant_header}
        prompt = self.system_header + system + self.separator
        for message in messages:
            if message["role"] not in headers:
                raise InputError(f"this template has the roles user and assistant, got {message['role']!r}")
            prompt += headers[message["role"]] + _text(message) + self.separator
        return prompt + self.assistant_header

    def jinja(self, system_message: str | None = None) -> str:
        """The same template for `transformers`, with `<IMG_CONTEXT>` for an image."""
        system = self.system_message if system_message is None else system_message
        turn = (
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
            "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        )
        return (
            "{% if messages[0]['role'] != 'system' %}" + _quoted(self.system_header + system + self.separator)
            + "{% endif %}{% for message in messages %}"
            + "{% if message['role'] == 'system' %}" + _quoted(self.system_header)
            + "{% elif message['role'] == 'user' %}" + _quoted(self.user_header)
            + "{% else %}" + _quoted(self.assistant_header) + "{% endif %}"
            + turn + _quoted(self.separator) + "{% endfor %}"
            + "{% if add_generation_prompt %}" + _quoted(self.assistant_header) + "{% endif %}"
        )  # fmt: skip


def _first_token(header: str) -> str:
    return header[: header.index(">") + 1]


def _quoted(text: str) -> str:
    """A Jinja expression that prints `text`."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    text = ""
    for part in content:
        if part.get("type") == "image":
            text += f"{IMAGE_SLOT}\n"
        elif part.get("type") == "text":
            text += part["text"]
        else:
            raise InputError(f"this model takes texts and images, got a part of type {part.get('type')!r}")
    return text


_CHATML = {
    "system_header": "<|im_start|>system\n",
    "user_header": "<|im_start|>user\n",
    "assistant_header": "<|im_start|>assistant\n",
}
TEMPLATES: dict[str, ChatTemplate] = {
    "Hermes-2": ChatTemplate(**_CHATML, separator="<|im_end|>", system_message=_SYSTEM_2),
    "internlm2-chat": ChatTemplate(**_CHATML, separator="<|im_end|>", system_message=_SYSTEM_2),
    "phi3-chat": ChatTemplate(
        "<|system|>\n", "<|user|>\n", "<|assistant|>\n", separator="<|end|>", system_message=_SYSTEM_2
    ),
    "internvl2_5": ChatTemplate(**_CHATML, separator="<|im_end|>\n", system_message=_SYSTEM_2_5),
}


def template_named(name: str) -> ChatTemplate:
    """Look a conversation template up.

    Raises:
        InputError: no template has this name; the known ones are listed.
    """
    if name not in TEMPLATES:
        raise InputError(f"config.json names the template {name!r}; supported are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def style_of(cfg: VLMConfig) -> PromptStyle:
    """The marks of a model's prompts: its family's, with the turns of the template that its configuration names.

    Raises:
        InputError: no template has this name.
    """
    style = STYLES[cfg.prompt_style]
    return style if cfg.chat_template is None else template_named(cfg.chat_template).styled(style)


def render_with_tokenizer(tokenizer: "PreTrainedTokenizerBase", messages: list[Any], **arguments: Any) -> str:
    """Render a chat in the tokenizer's own template, up to the header of the answer.

    `arguments` reach the template (`tools`, `enable_thinking`, ...). With `continue_final_message` the last message is
    left open, and no header follows.

    Such templates are programs by strangers. `transformers` runs them in Jinja's immutable sandbox, which keeps them
    from Python's internals and from files, and limits `range`; how long they compute is not bounded.

    Raises:
        InputError: there are several and none is the default; the template cannot be parsed, refuses the messages, or
            does something that the sandbox forbids.
    """
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise InputError(
            f"the checkpoint has the chat templates {', '.join(sorted(named))} and no default: set "
            "model.tokenizer.chat_template to the text of one"
        )
    try:
        header = not arguments.get("continue_final_message", False)
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": header, **arguments}
        return str(tokenizer.apply_chat_template(messages, **options))
    except Exception as error:  # templates raise whatever they compute
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"the checkpoint's chat template fails on these messages ({reason}): change them, or pass chat=False "
            "and the text as it should stand"
        ) from error
