"""Starts the driver: `python -m experiments.transformer --config=configs/transformer.py:VARIANT --workdir=DIR`."""

from experiments.common import driver
from experiments.transformer.config import read
from experiments.transformer.task import evaluate, train_and_evaluate

if __name__ == "__main__":
    driver.main("experiments.transformer", train_and_evaluate, evaluate, read)
