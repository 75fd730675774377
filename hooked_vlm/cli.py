"""The command line: `hooked-vlm COMMAND --help`. Errors are one sentence, without a traceback."""

import sys

import tyro

from hooked_vlm.activations import ActivationsError
from hooked_vlm.activations.command import CacheConfig, cache, summary
from hooked_vlm.converters import CheckpointError
from hooked_vlm.experiments.common.errors import StudyError
from hooked_vlm.experiments.head_attribution import commands as head_attribution_commands
from hooked_vlm.experiments.ocr_heads import commands as ocr_heads_commands
from hooked_vlm.experiments.ocr_heads import run as run_ocr_heads
from hooked_vlm.files import OutputError
from hooked_vlm.geometry import GeometryError
from hooked_vlm.hooks import HookError
from hooked_vlm.images import ImageError
from hooked_vlm.token_layout import InputError
from hooked_vlm.viewer.command import ViewConfig, write_page

EXPECTED = (
    ActivationsError,
    CheckpointError,
    GeometryError,
    HookError,
    ImageError,
    InputError,
    OutputError,
    StudyError,
)
"""What a user can cause and mend; anything else is a fault of ours and keeps its traceback."""

app = tyro.extras.SubcommandApp()


@app.command(name="ocr-heads")
def ocr_heads(experiment: tyro.conf.OmitArgPrefixes[ocr_heads_commands.Command]) -> None:
    """Which attention heads read text in images (arXiv 2505.15865)."""
    print(run_ocr_heads(experiment).summary)


@app.command(name="head-attribution")
def head_attribution(command: tyro.conf.OmitArgPrefixes[head_attribution_commands.Command]) -> None:
    """Which attention heads carry information from image to text (arXiv 2509.17588), measured by random ablations."""
    print(head_attribution_commands.answer(command))


@app.command(name="view")
def view(config: tyro.conf.OmitArgPrefixes[ViewConfig]) -> None:
    """Where the model looks: the attention of each answer token on the picture, as a page."""
    print(f"page: {write_page(config)}")


@app.command(name="cache")
def cache_activations(config: tyro.conf.OmitArgPrefixes[CacheConfig]) -> None:
    """Activations of a data set, written to a folder with an index of their tokens, patches and boxes."""
    print(summary(cache(config)))


def main() -> None:
    """Entry point of `hooked-vlm`."""
    try:
        app.cli(prog="hooked-vlm", description="Inside vision-language models: studies from the command line.")
    except EXPECTED as error:
        sys.exit(f"hooked-vlm: {error}")
    except KeyboardInterrupt:
        print("\nhooked-vlm: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
