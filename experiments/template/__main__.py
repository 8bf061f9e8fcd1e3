"""Starts the driver: `python -m experiments.template --config=configs/template.py:VARIANT --workdir=DIR`."""

from experiments.common import driver
from experiments.template.config import read
from experiments.template.task import evaluate, train_and_evaluate

if __name__ == "__main__":
    driver.main("experiments.template", train_and_evaluate, evaluate, read)
