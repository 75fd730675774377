"""What the studies share: figures, the report page, what a run records about itself."""

__all__: list[str] = []
