"""Experiments: one file per driver, one variant per experiment."""
