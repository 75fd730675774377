"""What the study asks: pages and texts with an answer in them, and the tasks that masking is measured on."""

__all__: list[str] = []
