"""Post-training reconstruction: weights of any set whose outputs on a calibration set are nearest to the dense ones."""
