"""The command line: `hooked-vlm COMMAND --help`. Errors are one sentence, without a traceback."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from typing import Any, Literal

import tyro

from hooked_vlm.commands.config import CacheConfig, HooksConfig, MergeConfig, ModelsConfig, PushConfig, ViewConfig
from hooked_vlm.errors import HookedVLMError
from hooked_vlm.experiments.head_attribution import config as head_attribution_config
from hooked_vlm.experiments.head_sweep.config import HeadSweepConfig
from hooked_vlm.experiments.ocr_heads import config as ocr_heads_config
from hooked_vlm.experiments.reproduce.config import ReproduceConfig
from hooked_vlm.experiments.steering.config import SteerConfig
from hooked_vlm.verify.config import VerifyConfig

app = tyro.extras.SubcommandApp()


@dataclass(frozen=True)
class Output:
    """How a command answers, the same for all."""

    json: bool = False
    """Print one JSON object, of an error too; exit statuses are the same."""
    quiet: bool = False
    """No progress bars."""


@dataclass(frozen=True)
class LongOutput(Output):
    """How a command answers that takes long."""

    track: Literal["wandb", "mlflow", "tensorboard"] | None = None
    """Log progress and results with this library too, if it is installed."""


Shared = tyro.conf.OmitArgPrefixes[Output]
SharedLong = tyro.conf.OmitArgPrefixes[LongOutput]


@app.command(name="models")
def models(config: tyro.conf.OmitArgPrefixes[ModelsConfig], output: Shared) -> None:
    """List known checkpoints: sizes, memory, and how many GPUs they need."""
    _run("commands.models", config, output)


@app.command(name="hooks")
def hooks(config: tyro.conf.OmitArgPrefixes[HooksConfig], output: Shared) -> None:
    """List the hook points of a model, with its numbers."""
    _run("commands.hooks", config, output)


@app.command(name="verify")
def verify(config: tyro.conf.OmitArgPrefixes[VerifyConfig], output: Shared) -> None:
    """Compare a checkpoint here and in transformers, side by side: exit status 0 if they agree, 1 if not."""
    found = _run("commands.verify", replace(config, quiet=output.quiet or output.json), output)
    sys.exit(0 if found["passed"] else 1)


@app.command(name="view")
def view(config: tyro.conf.OmitArgPrefixes[ViewConfig], output: Shared) -> None:
    """See where a model looks: the attention of each answer token on the picture, as a page."""
    _run("commands.view", config, output)


@app.command(name="cache")
def cache(config: tyro.conf.OmitArgPrefixes[CacheConfig], output: SharedLong) -> None:
    """Write activations of a data set to a folder, with an index of their tokens, patches and boxes."""
    _run("commands.cache", replace(config, quiet=output.quiet), output)


@app.command(name="sweep")
def sweep(config: tyro.conf.OmitArgPrefixes[HeadSweepConfig], output: SharedLong) -> None:
    """What each head does for the answers to a folder of pictures or a data set: one intervention per head."""
    _run("experiments.head_sweep.commands", replace(config, quiet=output.quiet), output)


@app.command(name="merge")
def merge(config: tyro.conf.OmitArgPrefixes[MergeConfig], output: Shared) -> None:
    """Join what the shards of a sweep, or of a stream of activations, wrote: the whole, as from one process."""
    _run("commands.merge", replace(config, quiet=output.quiet), output)


@app.command(name="push")
def push(config: tyro.conf.OmitArgPrefixes[PushConfig], output: Shared) -> None:
    """Send activations, or the tables of a run, to the hub as an ordinary data set; or write it to a folder."""
    _run("commands.push", config, output)


@app.command(name="ocr-heads")
def ocr_heads(experiment: tyro.conf.OmitArgPrefixes[ocr_heads_config.Command], output: SharedLong) -> None:
    """Study: which attention heads read text in images (arXiv 2505.15865)."""
    _run("experiments.ocr_heads.commands", replace(experiment, quiet=output.quiet), output)


@app.command(name="head-attribution")
def head_attribution(command: tyro.conf.OmitArgPrefixes[head_attribution_config.Command], output: SharedLong) -> None:
    """Study: which attention heads carry information from image to text (arXiv 2509.17588)."""
    asked = command if isinstance(command, head_attribution_config.Compare) else replace(command, quiet=output.quiet)
    _run("experiments.head_attribution.commands", asked, output)


@app.command(name="reproduce")
def reproduce(config: tyro.conf.OmitArgPrefixes[ReproduceConfig], output: SharedLong) -> None:
    """Judge the claims of a paper on a model: pass, differs or cannot say. Exit status 0 if nothing differs, else 1."""
    found = _run("experiments.reproduce.commands", replace(config, quiet=output.quiet), output)
    sys.exit(0 if found["passed"] else 1)


@app.command(name="steer")
def steer(config: tyro.conf.OmitArgPrefixes[SteerConfig], output: Shared) -> None:
    """Make steering vectors from two data sets, test them on held-out items, and answer with and without them."""
    _run("experiments.steering.commands", replace(config, quiet=output.quiet), output)


@app.command(name="completion")
def completion(shell: tyro.conf.Positional[Literal["bash", "zsh"]]) -> None:
    """Print completions for a shell, for a file that it reads when it starts."""
    _parse(["--tyro-print-completion", shell])


def _run(module: str, config: Any, output: Output) -> Any:
    """Print what a command's module answers, as text or as JSON; the latter is returned.

    The module is imported here and not above: parsing, help and completion need neither torch nor transformers.
    """
    track = output.track if isinstance(output, LongOutput) else None
    try:
        with _tracked(track, module, config) as log:
            text, data = import_module(f"hooked_vlm.{module}").answer(config)
            log(data)
    except HookedVLMError as error:
        if not output.json:
            raise
        print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        sys.exit(1)
    if shown := json.dumps(data, indent=2) if output.json else text:
        print(shown)
    return data


@contextmanager
def _tracked(library: Any, module: str, config: Any) -> Iterator[Callable[[dict[str, Any]], None]]:
    """`hooked_vlm.runtime.tracking.tracked`, if a library is asked for."""
    if library is None:
        yield lambda data: None
        return
    from hooked_vlm.runtime.tracking import tracked  # needs torch

    with tracked(library, module.removesuffix(".commands").rpartition(".")[2], asdict(config)) as log:
        yield log


def _refuse_unknown(given: list[str]) -> None:
    """Refuse a first word that is no command, with the command that it may mean."""
    if not given or given[0].startswith("-") or given[0] in app._subcommands:
        return
    near = get_close_matches(given[0], app._subcommands, n=1)
    meant = f"did you mean {near[0]}?" if near else f"commands are {', '.join(app._subcommands)}"
    print(f"hooked-vlm: there is no command {given[0]}: {meant}", file=sys.stderr)
    sys.exit(2)


def _parse(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    if given == ["--version"]:
        print(f"hooked-vlm {version('hooked-vlm')}")
        return
    _refuse_unknown(given)
    app.cli(
        prog="hooked-vlm",
        description="Inside vision-language models. Each command explains itself: hooked-vlm COMMAND --help",
        args=arguments,
        # options of a command may follow its subcommand; flags say what they switch, not what they leave
        config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.FlagCreatePairsOff),
    )


def _in_one_line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Show a warning as a sentence of the command, without the line of code that gave it."""
    print(f"hooked-vlm: {message}", file=sys.stderr)


def main() -> None:
    """Entry point of `hooked-vlm`."""
    try:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _in_one_line
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
