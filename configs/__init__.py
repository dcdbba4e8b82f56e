"""Methods and papers as values: one file each, `get_config()` returns an `Experiment` or a `Sweep`."""
