"""How prompts are written around text and pictures, family by family: values, looked up by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PromptStyle:
    """The marks of a chat, of its pictures and of the end of an answer.

    A turn is found by the special tokens that open and close it; in a style without such tokens, by its headers.
    """

    user_header: str
    """Opens a user's turn."""
    assistant_header: str
    """Opens an answer."""
    turn_starts: tuple[str, ...] = ()
    """Special tokens that open a turn; none: turns are found by their headers."""
    turn_end: str | None = None
    """The special token that closes a turn."""
    adds_marks: bool = False
    """Whether the tokens that open and close a picture are put around placeholders that lack them."""
    image_slot: str | None = None
    """What stands for an image in a text given by a user or by a chat template; None: its placeholder."""
    around_image: tuple[str, str] = ("", "")
    """Text before the token that opens a picture, and behind the one that closes it."""
    plain: bool = False
    """Whether there are no chats: a prompt is its pictures, the user's header, a text and the header of the answer."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Fields of the configuration, and the special tokens that only the tokenizer knows the ids of."""
    stop: str | None = None
    """The special token that ends an answer, where neither config.json nor generation_config.json says it."""


CHATML = PromptStyle(
    user_header="<|im_start|>user\n",
    assistant_header="<|im_start|>assistant\n",
    turn_starts=("<|im_start|>",),
    turn_end="<|im_end|>",
)
INTERNVL = PromptStyle(
    user_header="<|im_start|>user\n",
    assistant_header="<|im_start|>assistant\n",
    turn_starts=("<|im_start|>",),
    turn_end="<|im_end|>",
    adds_marks=True,
    tokens={
        "image_token_id": "<IMG_CONTEXT>",
        "vision_start_token_id": "<img>",
        "vision_end_token_id": "</img>",
    },
)
VICUNA = PromptStyle(user_header="USER:", assistant_header="ASSISTANT:")
MISTRAL = PromptStyle(user_header="[INST]", assistant_header="[/INST]")
LLAMA3 = PromptStyle(
    user_header="<|start_header_id|>user<|end_header_id|>\n\n",
    assistant_header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    turn_starts=("<|start_header_id|>",),
    turn_end="<|eot_id|>",
)
IDEFICS3 = PromptStyle(user_header="User:", assistant_header="Assistant:", turn_end="<end_of_utterance>")
GEMMA = PromptStyle(
    user_header="<start_of_turn>user\n",
    assistant_header="<start_of_turn>model\n",
    turn_starts=("<start_of_turn>",),
    turn_end="<end_of_turn>",
    image_slot="<start_of_image>",
    around_image=("\n\n", "\n\n"),
)
PALIGEMMA = PromptStyle(user_header="<bos>", assistant_header="\n", plain=True)
STYLES: dict[str, PromptStyle] = {
    "chatml": CHATML,
    "internvl": INTERNVL,
    "vicuna": VICUNA,
    "mistral": MISTRAL,
    "llama3": LLAMA3,
    "idefics3": IDEFICS3,
    "gemma": GEMMA,
    "paligemma": PALIGEMMA,
}
"""Styles by the name that a configuration gives (`VLMConfig.prompt_style`)."""
