"""Errors that a user can cause and mend: one sentence with what was expected, what came, and what to do."""


class HookedVLMError(Exception):
    """Base of all errors below; any other exception is a fault of the library."""


class UsageError(HookedVLMError):
    """A command line that names no command, or options that the command does not have."""


class InputError(HookedVLMError, ValueError):
    """Inputs that do not fit together: images against placeholders, shapes, padding, context length."""


class ImageError(HookedVLMError, ValueError):
    """An image that cannot be read or used."""


class GeometryError(HookedVLMError, ValueError):
    """A box or a token that is not in the image."""


class NotSeenError(GeometryError):
    """A box in a part of the image that the model does not see: it was cropped, or no patch covers it."""


class HookError(HookedVLMError, ValueError):
    """A hook that cannot act: its name is unknown, its filter matches nothing, its hook point is switched off; or a
    hook that returns another shape or dtype than it was given."""


class NotFiniteError(HookedVLMError, ArithmeticError):
    """Numbers that overflowed, or are not numbers."""


class CheckpointError(HookedVLMError, ValueError):
    """A checkpoint folder, its `config.json` or its tensors are not what the model needs."""


class CheckpointWarning(CheckpointError, UserWarning):
    """A checkpoint folder holds what the model has no place for and what cannot change a number: a warning, which is
    an error only where Python's filters make it one."""


class PrecisionWarning(HookedVLMError, UserWarning):
    """A model is used in a dtype that does not hold its activations: a warning, as `CheckpointWarning` is."""


class ActivationsError(HookedVLMError, ValueError):
    """A folder of activations, or a file in it, that cannot be read."""


class FeatureError(HookedVLMError, ValueError):
    """A dictionary of features, or a file of one, that cannot be used, or does not fit a model."""


class StudyError(HookedVLMError, ValueError):
    """A setting or a data set of a study that cannot be used."""


class OutputError(HookedVLMError, OSError):
    """A file or folder that cannot be written."""


class WorkerError(HookedVLMError, RuntimeError):
    """Workers cannot be started, or a task ends them again and again."""
