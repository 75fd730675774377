"""The commands of the command line, one module each; `config` holds their options."""

__all__: list[str] = []
