"""What training and evaluation need to know of a model family: its model, its prompt, its image tokens.

The toys are trained with ``transformers``' own models, not with this library's: a checkpoint is then an outside
fact for the library to reproduce, like a published one, and a mistake in our forward pass cannot hide in weights
trained with the same mistake.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from hooked_vlm.inputs.geometry import ImageLayout
from hooked_vlm.runtime.files import atomic_write
from tools.toy_training.tokenizer import build_tokenizer, save_tokenizer

HFModel = Any
"""One of `transformers`' models for images and text; its parts are reached into, which its types do not know."""


class ToyFamily(ABC):
    """One of the two architectures; stateless."""

    name: ClassVar[str]
    """Of the bundled checkpoint's folder."""
    special_tokens: ClassVar[tuple[str, ...]]
    """The first three are the padding and the two ends of a turn, in both families."""
    prompt_start: ClassVar[str]
    """Before the first turn."""
    turn_separator: ClassVar[str]
    """Between ``<|im_end|>`` and what follows."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return build_tokenizer(self.special_tokens)

    @cached_property
    def text_start(self) -> int:
        """Position of the first token of the first question, or of what opens its image."""
        return len(self.tokenizer.encode(f"{self.prompt_start}<|im_start|>user\n", add_special_tokens=False).ids)

    @property
    def image_start(self) -> int:
        """Position of the first image token; one token opens an image."""
        return self.text_start + 1

    @abstractmethod
    def image_text(self, n_tokens: int) -> str:
        """An image in a prompt: what opens it, its ``n_tokens`` placeholders, what closes it."""

    @abstractmethod
    def build(self, **overrides: int) -> HFModel:
        """Freshly initialised from torch's current seed; ``overrides`` are settings of the decoder."""

    @abstractmethod
    def grid(self, height: int, width: int) -> ImageLayout:
        """The image tokens of an image of so many pixels."""

    @abstractmethod
    def pixel_values(self, images: UInt8[Tensor, "image height width 3"]) -> Float[Tensor, "..."]:
        """What the family's image processor makes of images of one size."""

    @abstractmethod
    def positions(self, length: int, grid: ImageLayout | None) -> Int[Tensor, "*axes 1 pos"]:
        """Positions of a conversation whose first turn has an image of ``grid``, or none."""

    @abstractmethod
    def image_features(
        self, model: HFModel, pixel_values: Float[Tensor, "..."], grid: ImageLayout
    ) -> Float[Tensor, "image token d_model"]:
        """What takes the place of the image tokens, for images of one grid."""

    def prepare_training(self, model: HFModel) -> None:  # noqa: B027  (nothing to do is a fine default)
        """Replaces what is needlessly slow in the reference; the results stay the same."""

    @abstractmethod
    def save(self, model: HFModel, folder: Path, **overrides: int) -> None:
        """Writes the checkpoint as the family is published; ``overrides`` as in `build`."""

    @abstractmethod
    def load(self, folder: Path) -> HFModel:
        """The checkpoint in `transformers`."""


def write_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    files: dict[str, dict],
    special_tokens: Sequence[str],
    **tokenizer_settings: str,
) -> None:
    """Writes a checkpoint's folder: the tokenizer, its weights, and ``files`` as JSON; each whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    save_tokenizer(folder, special_tokens, **tokenizer_settings)
    atomic_write(folder / "model.safetensors", lambda aside: _save_tensors(tensors, aside))
    for name, content in files.items():
        atomic_write(folder / name, lambda aside, c=content: aside.write_text(json.dumps(c, indent=2) + "\n"))


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # save_file leaves it readable by its owner only


def text_shape(model: HFModel) -> tuple[int, int]:
    """Layers and heads of the decoder."""
    text = model.config.text_config
    return text.num_hidden_layers, text.num_attention_heads


def normal_vision_weights(tower: torch.nn.Module, depth: int, writing: tuple[str, ...]) -> None:
    """Draws a vision tower's matrices with a standard deviation of 1 / sqrt(fan in).

    Those that write to the residual stream (names that end in ``writing``) start smaller by sqrt(2 x depth).
    transformers' 0.02, meant for widths above 1000, leaves a tower of width 96 nearly linear, and letters were not
    told apart for a long time. The decoder keeps 0.02: with larger weights it was slow to find the right line even
    in plain text.
    """
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name.endswith("weight") and parameter.ndim >= 2:
                std = parameter[0].numel() ** -0.5
                parameter.normal_(0, std / (2 * depth) ** 0.5 if name.endswith(writing) else std)
