"""Starts the driver: `python -m experiments.crossbar --config=configs/crossbar.py:VARIANT --workdir=DIR`."""

from experiments.common import driver
from experiments.crossbar.config import read
from experiments.crossbar.task import evaluate, run

if __name__ == "__main__":
    driver.main("experiments.crossbar", run, evaluate, read)
