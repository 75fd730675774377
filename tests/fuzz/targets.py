"""Each target makes one case from bytes and holds it to the laws: its word for what became of it."""

from collections.abc import Callable

from fuzz.calls import hook_names, interventions, prompts
from fuzz.checkpoint_files import images, loading, settings, tensors, tokenizers
from fuzz.command_lines import command_line
from fuzz.records import data_set, records
from fuzz.seeds import checkpoints, internlm2_tokenizer, models, pictures

TARGETS: dict[str, Callable[[bytes], str]] = {
    "settings": settings,
    "loading": loading,
    "tensors": tensors,
    "tokenizers": tokenizers,
    "images": images,
    "hook_names": hook_names,
    "interventions": interventions,
    "prompts": prompts,
    "records": records,
    "command_line": command_line,
}


def prepare() -> None:
    """Make now what cases start from, so that no case is charged with it."""
    for make in (checkpoints, internlm2_tokenizer, models, pictures, data_set):
        make()
