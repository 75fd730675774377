"""`--quiet`: nothing on standard error but an error, whichever library is at work."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SETTINGS = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_LOG_TO_STDERR": "0",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_SILENT": "true",
}
"""What other libraries read when they are imported, which a command does later than this."""


@contextmanager
def only_errors() -> Iterator[None]:
    """Silence bars, warnings and log messages below an error, ours included."""
    before, level = {name: os.environ.get(name) for name in SETTINGS}, logging.root.manager.disable
    os.environ.update(SETTINGS)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
