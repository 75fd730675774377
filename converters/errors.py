"""What every converter raises when a checkpoint cannot be used."""


class CheckpointError(ValueError):
    """A checkpoint folder, its `config.json` or its tensors are not what the model needs."""
