"""Starts the driver: `python -m experiments.language_model --config=configs/language_model.py:VARIANT`."""

from experiments.common import driver
from experiments.language_model.config import read
from experiments.language_model.task import evaluate, train_and_evaluate

if __name__ == "__main__":
    driver.main("experiments.language_model", train_and_evaluate, evaluate, read)
