"""Methods or constraint families against rate or bytes: `python -m experiments.sweep`."""
