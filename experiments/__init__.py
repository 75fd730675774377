"""The studies: one package each, with a `run(config)`, a command and a report."""
