"""One file per driver. A variant is an experiment with its expected result in its docstring."""
