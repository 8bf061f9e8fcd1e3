"""Starts the driver: `python -m experiments.gru_speech --config=configs/gru_speech.py:VARIANT --workdir=DIR`."""

from experiments.common import driver
from experiments.gru_speech.config import read
from experiments.gru_speech.task import evaluate, train_and_evaluate

if __name__ == "__main__":
    driver.main("experiments.gru_speech", train_and_evaluate, evaluate, read)
