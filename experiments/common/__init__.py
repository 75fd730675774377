"""What the studies share: figures, the report page, what a run records about itself."""
