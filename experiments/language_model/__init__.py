"""LSTM language models with density-adaptive blocks (DARB): `python -m experiments.language_model`."""
