"""The command line: `hooked-vlm COMMAND --help`. Errors are one sentence, without a traceback."""

import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, Literal, TypeVar

import tyro

from hooked_vlm.analysis.text_tables import in_width
from hooked_vlm.commands.config import (
    AtlasCompareConfig,
    AtlasConfig,
    CacheConfig,
    HooksConfig,
    MergeConfig,
    ModelsConfig,
    PushConfig,
    ViewConfig,
)
from hooked_vlm.commands.flags import with_flags
from hooked_vlm.commands.quiet import only_errors
from hooked_vlm.errors import HookedVLMError, UsageError
from hooked_vlm.experiments.demo.config import DemoConfig
from hooked_vlm.experiments.features import config as features_config
from hooked_vlm.experiments.head_attribution import config as head_attribution_config
from hooked_vlm.experiments.head_sweep.config import HeadSweepConfig
from hooked_vlm.experiments.ocr_heads import config as ocr_heads_config
from hooked_vlm.experiments.reproduce.config import ReproduceConfig
from hooked_vlm.experiments.steering.config import SteerConfig
from hooked_vlm.verify.config import VerifyConfig

app = tyro.extras.SubcommandApp()
T = TypeVar("T")
Options = Annotated[T, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]
"""Settings whose fields are a command's options, without a heading of their own."""

FISH_ARGUMENT = '$python_cmd -c "$pycode" $words'
FISH_INPUT = 'printf %s "$pycode" | $python_cmd - $words'
"""The parser's script for fish hands over a program that is longer than Linux lets an argument be (128 KiB)."""


@dataclass(frozen=True)
class Output:
    """How a command answers, the same for all."""

    json: bool = False
    """Print one JSON object, of an error too; exit statuses are the same."""
    quiet: bool = False
    """Nothing on standard error but an error: no bars, no warnings."""


@dataclass(frozen=True)
class LongOutput(Output):
    """How a command answers that takes long."""

    track: Literal["wandb", "mlflow", "tensorboard"] | None = None
    """Log progress and results with this library too, if it is installed."""


@dataclass(frozen=True)
class Work:
    """A command line that was understood."""

    module: str
    """What answers; imported when the work begins: parsing, help and completion need neither torch nor transformers."""
    config: Any
    output: Output
    judges: bool = False
    """The exit status says whether the model passed."""


@app.command(name="demo")
def demo(config: Options[DemoConfig], output: Options[Output]) -> Work:
    """Find the two heads that read a page, turn them down, and watch the answer go."""
    return Work("experiments.demo.commands", replace(config, quiet=output.quiet), output)


@app.command(name="models")
def models(config: Options[ModelsConfig], output: Options[Output]) -> Work:
    """List known checkpoints: sizes, memory, GPUs; nothing is loaded."""
    return Work("commands.models", config, output)


@app.command(name="hooks")
def hooks(config: Options[HooksConfig], output: Options[Output]) -> Work:
    """List the hook points of a model, with its numbers; nothing is loaded."""
    return Work("commands.hooks", config, output)


@app.command(name="verify")
def verify(config: Options[VerifyConfig], output: Options[Output]) -> Work:
    """Compare a checkpoint with transformers: exit status 0 if they agree, else 1."""
    return Work("commands.verify", replace(config, quiet=output.quiet or output.json), output, judges=True)


@app.command(name="view")
def view(config: Options[ViewConfig], output: Options[Output]) -> Work:
    """Show where a model looks in a picture for each answer token, as a page."""
    return Work("commands.view", config, output)


@app.command(name="cache")
def cache(config: Options[CacheConfig], output: Options[LongOutput]) -> Work:
    """Write activations of a data set, with an index of their tokens and boxes."""
    return Work("commands.cache", replace(config, quiet=output.quiet), output)


@app.command(name="sweep")
def sweep(config: Options[HeadSweepConfig], output: Options[LongOutput]) -> Work:
    """Measure what each head does for the answers to a data set, one by one."""
    return Work("experiments.head_sweep.commands", replace(config, quiet=output.quiet), output)


@app.command(name="atlas")
def atlas(config: Options[AtlasConfig], output: Options[LongOutput]) -> Work:
    """Profile every head of both towers, as one page and as tables."""
    return Work("commands.atlas", replace(config, quiet=output.quiet), output)


@app.command(name="atlas-compare")
def atlas_compare(config: Options[AtlasCompareConfig], output: Options[Output]) -> Work:
    """Compare two atlases of heads: which heads do something else."""
    return Work("commands.atlas_compare", config, output)


@app.command(name="merge")
def merge(config: Options[MergeConfig], output: Options[Output]) -> Work:
    """Join what the shards of a sweep, or of a stream of activations, wrote."""
    return Work("commands.merge", replace(config, quiet=output.quiet), output)


@app.command(name="push")
def push(config: Options[PushConfig], output: Options[Output]) -> Work:
    """Send activations or the tables of a run to the hub as a data set."""
    return Work("commands.push", config, output)


@app.command(name="ocr-heads")
def ocr_heads(experiment: Options[ocr_heads_config.Command], output: Options[LongOutput]) -> Work:
    """Study: which heads read text in images (arXiv 2505.15865)."""
    return Work("experiments.ocr_heads.commands", replace(experiment, quiet=output.quiet), output)


@app.command(name="head-attribution")
def head_attribution(command: Options[head_attribution_config.Command], output: Options[LongOutput]) -> Work:
    """Study: which heads carry information from image to text (arXiv 2509.17588)."""
    asked = command if isinstance(command, head_attribution_config.Compare) else replace(command, quiet=output.quiet)
    return Work("experiments.head_attribution.commands", asked, output)


@app.command(name="reproduce")
def reproduce(config: Options[ReproduceConfig], output: Options[LongOutput]) -> Work:
    """Judge the claims of a paper on a model: exit status 1 if one differs, else 0."""
    return Work("experiments.reproduce.commands", replace(config, quiet=output.quiet), output, judges=True)


@app.command(name="steer")
def steer(config: Options[SteerConfig], output: Options[Output]) -> Work:
    """Make steering vectors of two data sets, and answer with and without them."""
    return Work("experiments.steering.commands", replace(config, quiet=output.quiet), output)


@app.command(name="features")
def features(command: Options[features_config.Command], output: Options[LongOutput]) -> Work:
    """Train a sparse dictionary, and find what its features stand for."""
    return Work("experiments.features.commands", replace(command, quiet=output.quiet), output)


@app.command(name="completion")
def completion(shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]) -> None:
    """Print completions for a shell, for a file that it reads when it starts."""
    script = io.StringIO()
    with redirect_stdout(script), suppress(SystemExit):
        _understood(["--tyro-print-completion", shell])
    print(script.getvalue().replace(FISH_ARGUMENT, FISH_INPUT), end="")
    sys.exit()


def _run(work: Work) -> None:
    """Print what a command's module answers, as text or as JSON.

    Raises:
        HookedVLMError: names options where the library's message names arguments.
    """
    track = work.output.track if isinstance(work.output, LongOutput) else None
    warnings.showwarning = partial(_in_one_line, work.config)
    try:
        with _tracked(track, work.module, work.config) as log:
            text, data = import_module(f"hooked_vlm.{work.module}").answer(work.config)
            log(data)
    except HookedVLMError as error:
        error.args = (with_flags(str(error), work.config),)
        raise
    if shown := json.dumps(data, indent=2) if work.output.json else in_width(text):
        print(shown)
    if work.judges:
        sys.exit(0 if data["passed"] else 1)


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
    """Refuse a first word that is no command, with the command that it may mean.

    Raises:
        UsageError: there is no such command.
    """
    if not given or given[0].startswith("-") or given[0] in app._subcommands:
        return
    near = get_close_matches(given[0], app._subcommands, n=1)
    meant = f"did you mean {near[0]}?" if near else f"commands are {', '.join(app._subcommands)}"
    raise UsageError(f"there is no command {given[0]}: {meant}")


def _understood(given: list[str]) -> Work | None:
    """Parse the words of a command line; None: it was answered (a version, a help, completions).

    Raises:
        UsageError: as JSON is asked for, or the command does not exist; the parser itself ends the process otherwise.
    """
    if given == ["--version"]:
        print(f"hooked-vlm {version('hooked-vlm')}")
        return None
    _refuse_unknown(given)
    refusal = io.StringIO() if "--json" in given else None
    try:
        with nullcontext() if refusal is None else redirect_stderr(refusal):
            return app.cli(
                prog="hooked-vlm",
                description="Inside vision-language models. Each command explains itself: hooked-vlm COMMAND --help",
                args=given,
                # options of a command may follow its subcommand; flags say what they switch, not what they leave; an
                # option that is left out is None, and no word on the command line is
                config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as ended:
        if refusal is None or not ended.code:
            raise
        raise UsageError(_first_sentence(refusal.getvalue())) from ended


def _first_sentence(box: str) -> str:
    """What a box of the parser says above its first ruler."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    rulers = (i for i, line in enumerate(lines) if line.startswith("──"))
    return " ".join(" ".join(lines[: next(rulers, None)]).split())


def _in_one_line(config: Any, message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Show a warning as a sentence of the command, without the line of code that gave it."""
    print(f"hooked-vlm: {with_flags(str(message), config)}", file=sys.stderr)


def _end(error: HookedVLMError, as_json: bool) -> None:
    """End the process with an error: one sentence, or one JSON object."""
    status = 2 if isinstance(error, UsageError) else 1
    if as_json:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        sys.exit(status)
    if status == 2:
        print(f"hooked-vlm: {error}", file=sys.stderr)
        sys.exit(status)
    sys.exit(f"hooked-vlm: {error}")  # which is status 1


def main() -> None:
    """Entry point of `hooked-vlm`."""
    try:
        try:
            work = _understood(sys.argv[1:])
            if work is not None:
                with warnings.catch_warnings(), only_errors() if work.output.quiet else nullcontext():
                    _run(work)
        except HookedVLMError as error:
            _end(error, as_json="--json" in sys.argv[1:])
        finally:
            sys.stdout.flush()  # here, where a reader who has gone is no error
    except KeyboardInterrupt:
        print("\nhooked-vlm: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
