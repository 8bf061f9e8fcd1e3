"""Image classifiers under any constraint: `python -m experiments.cnn`."""
