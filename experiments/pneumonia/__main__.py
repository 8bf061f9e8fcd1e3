"""Starts the driver: `python -m experiments.pneumonia --config=configs/pneumonia.py:VARIANT --workdir=DIR`."""

from experiments.common import driver
from experiments.pneumonia.config import read
from experiments.pneumonia.task import evaluate, train_and_evaluate

if __name__ == "__main__":
    driver.main("experiments.pneumonia", train_and_evaluate, evaluate, read)
