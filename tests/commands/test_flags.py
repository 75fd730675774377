"""Options in the place of arguments, in messages of the library."""

from dataclasses import dataclass, field

import pytest

from hooked_vlm.commands.flags import option_names, with_flags


@dataclass
class Nested:
    keep_as: str = ""


@dataclass
class Settings:
    max_pixels: int = 0
    max_pixels_of_all: int = 0
    tokens: int = 0
    device: str = ""
    nested: Nested = field(default_factory=Nested)


def test_options_are_those_of_nested_settings_too() -> None:
    assert option_names(Settings()) == {"max_pixels", "max_pixels_of_all", "tokens", "device", "nested", "keep_as"}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("max_pixels must be at least 1", "--max-pixels must be at least 1"),
        ("set max_pixels_of_all, max_pixels or keep_as.", "set --max-pixels-of-all, --max-pixels or --keep-as."),
        ("max_pixels=3 is little (now max_pixels=9)", "--max-pixels 3 is little (now --max-pixels 9)"),
        ("pass device='cpu'", "pass --device 'cpu'"),
        ("give device=", "give --device"),
        ("pass device=..., or wait", "pass --device, or wait"),
        ("pass device=None or keep_as=torch.float32", "pass no --device or --keep-as float32"),
        ("the device has no tokens", "the device has no tokens"),
        ("--max-pixels is 3", "--max-pixels is 3"),
        ("cannot read /data/max_pixels/a, max_pixels.json", "cannot read /data/max_pixels/a, max_pixels.json"),
        ("no hook 'keep_as' in my_max_pixels", "no hook 'keep_as' in my_max_pixels"),
        ("use model.to_inputs(tokens, max_pixels=3)", "use model.to_inputs(tokens, max_pixels=3)"),
    ],
)
def test_messages(message: str, shown: str) -> None:
    assert with_flags(message, Settings()) == shown
