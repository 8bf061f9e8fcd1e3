"""Starts the driver: `python -m experiments.sweep --config=configs/sweep.py:VARIANT --workdir=DIR`."""

from experiments.common import driver
from experiments.sweep.task import evaluate, read, run

if __name__ == "__main__":
    driver.main("experiments.sweep", run, evaluate, read)
