"""Data of the study: pages and texts that contain an answer, and the tasks for masking."""

__all__: list[str] = []
