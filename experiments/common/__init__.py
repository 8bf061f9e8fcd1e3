"""What all drivers share: models, data, training, reports, and the runner."""
