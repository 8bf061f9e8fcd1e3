"""FORMS and SOT-MRAM on simulated engines: `python -m experiments.crossbar`."""
