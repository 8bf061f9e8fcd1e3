"""Starts the driver: `python -m experiments.entity_linking --config=configs/entity_linking.py:VARIANT`."""

from experiments.common import driver
from experiments.entity_linking.config import read
from experiments.entity_linking.task import evaluate, train_and_evaluate

if __name__ == "__main__":
    driver.main("experiments.entity_linking", train_and_evaluate, evaluate, read)
