"""What a user of a study can cause and mend."""


class StudyError(ValueError):
    """A setting or a data set of a study that cannot be used."""
