"""Block-pruned GRU speech recognition (RTMobile): `python -m experiments.gru_speech`."""
