"""Starts the driver: `python -m experiments.cnn --config=configs/cnn.py:VARIANT --workdir=DIR`."""

from experiments.cnn.config import read
from experiments.cnn.task import evaluate, train_and_evaluate
from experiments.common import driver

if __name__ == "__main__":
    driver.main("experiments.cnn", train_and_evaluate, evaluate, read)
