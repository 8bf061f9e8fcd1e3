"""Starts the driver: `python -m experiments.language_model --config=configs/language_model.py:VARIANT`."""

from experiments.common import driver
from experiments.language_model.curves import evaluate, read, run

if __name__ == "__main__":
    driver.main("experiments.language_model", run, evaluate, read)
