"""Shared by the studies: figures, the report page, workers, row-wise access to tables."""

__all__: list[str] = []
