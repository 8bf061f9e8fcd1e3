"""Starts the driver: `python -m experiments.federated --config=configs/federated.py:VARIANT --workdir=DIR`."""

from experiments.common import driver
from experiments.federated.config import read
from experiments.federated.task import evaluate, train_and_evaluate

if __name__ == "__main__":
    driver.main("experiments.federated", train_and_evaluate, evaluate, read)
