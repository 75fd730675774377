"""The chat template of a checkpoint folder, from where a processor of `transformers` finds it."""

from pathlib import Path
from typing import TYPE_CHECKING

from hooked_vlm.converters import read_json
from hooked_vlm.errors import CheckpointError
from hooked_vlm.inputs.tokenization import template_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEGACY_FILE = "chat_template.json"


def take_processor_template(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Give the tokenizer the chat template that the checkpoint's processor has, if it has one.

    Raises:
        CheckpointError: see `processor_template`.
    """
    if (found := processor_template(folder)) is not None:
        tokenizer.chat_template = found


def processor_template(folder: Path) -> str | dict[str, str] | None:
    """The chat template, or several by name, that a processor of `transformers` takes from a folder.

    Its order (processing_utils.py, `get_processor_dict`): the key of `processor_config.json`, `chat_template.json`,
    `chat_template.jinja` with the files in `additional_chat_templates`. It does not look into `tokenizer_config.json`,
    which therefore counts only where this is None.

    Raises:
        CheckpointError: a file that cannot be read or holds no template; `chat_template.json` beside
            `additional_chat_templates`, which transformers refuses, too.
    """
    legacy, files = read_json(folder, LEGACY_FILE, default=None), template_files(folder)
    if legacy is not None and (more := set(files) - {"default"}):
        raise CheckpointError(
            f"{folder} has {LEGACY_FILE} and additional_chat_templates ({', '.join(sorted(more))}), of which "
            "transformers takes neither: remove one of them"
        )
    stated = read_json(folder, "processor_config.json", default={}).get("chat_template")
    if stated is not None:
        return _checked(stated, "processor_config.json")
    if legacy is not None:
        return _checked(legacy.get("chat_template"), LEGACY_FILE)
    return files["default"] if set(files) == {"default"} else files or None


def _checked(template: object, file: str) -> str | dict[str, str]:
    if isinstance(template, str):
        return template
    if isinstance(template, dict) and template and all(isinstance(t, str) for t in template.values()):
        return template
    raise CheckpointError(f"{file}: chat_template must be a text, or an object of texts by name, got {template!r:.80}")
