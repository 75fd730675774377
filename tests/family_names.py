"""Names of the families of `families.py`: apart, since a conftest is imported before shapes are executed."""

ONE_OF_EACH_KIND = ("qwen3-vl", "internvl2", "llava-onevision", "gemma3", "paligemma2")
"""A plain run holds every law of these."""

OTHERS = ("qwen2-vl", "qwen2.5-vl", "internvl3.5", "llava", "llava-next", "paligemma", "idefics3", "made-up")
"""Of these a plain run compares a batch with the reference and looks at every hook; their laws run with --full."""
