"""Federated learning with sparse encrypted updates (ESMFL): `python -m experiments.federated`."""
