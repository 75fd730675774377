"""The command line: `hooked-vlm COMMAND --help`. Errors are one sentence, without a traceback."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image

from hooked_vlm.commands import hooks as hooks_command
from hooked_vlm.commands import models as models_command
from hooked_vlm.commands import verify as verify_command
from hooked_vlm.commands.cache import CacheConfig, cache, summary
from hooked_vlm.commands.view import ViewConfig, serve_page, write_page
from hooked_vlm.errors import HookedVLMError
from hooked_vlm.experiments.head_attribution import commands as head_attribution_commands
from hooked_vlm.experiments.ocr_heads import commands as ocr_heads_commands
from hooked_vlm.toys.pages import make_page

app = tyro.extras.SubcommandApp()


@dataclass(frozen=True)
class Output:
    """How a command answers, the same for all."""

    json: bool = False
    """Print one JSON object, of an error too; exit statuses are the same."""
    quiet: bool = False
    """No progress bars."""


Shared = tyro.conf.OmitArgPrefixes[Output]


@app.command(name="models")
def models(config: tyro.conf.OmitArgPrefixes[models_command.ModelsConfig], output: Shared) -> None:
    """List known checkpoints: sizes, memory, and how many GPUs they need."""
    _say(lambda: models_command.answer(config), output)


@app.command(name="hooks")
def hooks(config: tyro.conf.OmitArgPrefixes[hooks_command.HooksConfig], output: Shared) -> None:
    """List the hook points of a model, with its numbers."""
    _say(lambda: hooks_command.answer(config), output)


@app.command(name="verify")
def verify(config: tyro.conf.OmitArgPrefixes[verify_command.VerifyConfig], output: Shared) -> None:
    """Compare a checkpoint here and in transformers, side by side: exit status 0 if they agree, 1 if not."""
    found = _say(lambda: verify_command.answer(replace(config, quiet=output.quiet or output.json)), output)
    sys.exit(0 if found["passed"] else 1)


@app.command(name="view")
def view(config: tyro.conf.OmitArgPrefixes[ViewConfig], output: Shared) -> None:
    """See where a model looks: the attention of each answer token on the picture, as a page."""

    def answer() -> tuple[str, dict[str, Any]]:
        if config.serve:
            serve_page(config, _example)
            return "", {}
        page = write_page(config)
        return f"page: {page}", {"page": str(page)}

    _say(answer, output)


@app.command(name="cache")
def cache_activations(config: tyro.conf.OmitArgPrefixes[CacheConfig], output: Shared) -> None:
    """Write activations of a data set to a folder, with an index of their tokens, patches and boxes."""

    def answer() -> tuple[str, dict[str, Any]]:
        found = cache(replace(config, quiet=output.quiet))
        return summary(found), {"folder": str(found.folder), "samples": found.n_samples, "rows": found.n_rows}

    _say(answer, output)


@app.command(name="ocr-heads")
def ocr_heads(experiment: tyro.conf.OmitArgPrefixes[ocr_heads_commands.Command], output: Shared) -> None:
    """Study: which attention heads read text in images (arXiv 2505.15865)."""
    _say(lambda: ocr_heads_commands.answer(replace(experiment, quiet=output.quiet)), output)


@app.command(name="head-attribution")
def head_attribution(command: tyro.conf.OmitArgPrefixes[head_attribution_commands.Command], output: Shared) -> None:
    """Study: which attention heads carry information from image to text (arXiv 2509.17588)."""
    _say(lambda: head_attribution_commands.answer(command, output.quiet), output)


@app.command(name="completion")
def completion(shell: tyro.conf.Positional[Literal["bash", "zsh"]]) -> None:
    """Print completions for a shell, for a file that it reads when it starts."""
    _parse(["--tyro-print-completion", shell])


def _example() -> tuple[Image.Image, str]:
    """A picture and a question for the toy models to begin with."""
    page = make_page(np.random.default_rng(7), n_lines=4)
    return page.image, page.question(2)


def _say(answer: Callable[[], tuple[str, Any]], output: Output) -> Any:
    """Print what a command answers, as text or as JSON; the latter is returned."""
    try:
        text, data = answer()
    except HookedVLMError as error:
        if not output.json:
            raise
        print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        sys.exit(1)
    if shown := json.dumps(data, indent=2) if output.json else text:
        print(shown)
    return data


def _parse(arguments: list[str] | None = None) -> None:
    app.cli(
        prog="hooked-vlm",
        description="Inside vision-language models. Each command explains itself: hooked-vlm COMMAND --help",
        args=arguments,
        # options of a command may follow its subcommand; flags say what they switch, not what they leave
        config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.FlagCreatePairsOff),
    )


def main() -> None:
    """Entry point of `hooked-vlm`."""
    try:
        try:
            _parse()
        finally:
            sys.stdout.flush()  # here, where a reader who has gone is no error
    except HookedVLMError as error:
        sys.exit(f"hooked-vlm: {error}")
    except KeyboardInterrupt:
        print("\nhooked-vlm: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
