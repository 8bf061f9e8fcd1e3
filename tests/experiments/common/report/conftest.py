"""A sample run, made up but shaped like a real one: LeNet-5 on digits through all four phases."""

import numpy as np
import pytest

from experiments.common.report import run
from experiments.common.report import summary as summaries
from experiments.common.report.layers import Layer
from experiments.common.report.metrics import MetricsWriter, read_metrics

SHAPES = {
    "params/Conv_0/kernel": (5, 5, 1, 20),
    "params/Conv_1/kernel": (5, 5, 20, 50),
    "params/Dense_0/kernel": (800, 500),
    "params/Dense_1/kernel": (500, 10),
}
DENSITY = {"params/Conv_0/kernel": 0.7, "params/Conv_1/kernel": 0.1, "params/Dense_0/kernel": 0.005}


def sample_summary(**changes):
    fields = {
        "driver": "cnn",
        "variant": "mnist_lenet5_unstructured",
        "seed": 0,
        "dataset": {"name": "digits", "source": "scikit-learn", "train": 1437, "test": 360, "stand_in": True},
        "metric": {
            "name": "accuracy",
            "higher_is_better": True,
            "dense": 0.9925,
            "dense_same_budget": 0.9931,
            "one_shot": 0.9704,
            "hardened": 0.9851,
            "compressed": 0.9921,
        },
        "rate": {"constrained_weights": 85.2, "all_weights": 84.1, "bytes": 40.1},
        "bytes": {"dense": 1722000, "packed": 42943},
        "residual": {"primal": 0.0123, "dual": 0.00031},
        "violations": 0,
        "latency_ms": {"dense": 1.523, "compressed": 0.702},
        "seconds": 151.2,
        "paper": {"quantity": "rate.constrained_weights", "value": 85},
    }
    run = {
        "command": "python -m experiments.cnn --config=configs/cnn.py:mnist_lenet5_unstructured --workdir=runs/a",
        "date": "2026-01-02T03:04:05Z",
        "machine": {"system": "Linux x86_64", "processor": "A CPU", "cores": 2, "memory_bytes": 8 * 2**30},
        "versions": {"python": "3.11.2", "jax": "0.10.2"},
    }
    own = changes.pop(changes.get("driver", "cnn"), {"run": run})
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        if inner:
            fields[outer] = fields[outer] | {inner: value}
        else:
            fields[outer] = value
    return summaries.make_summary(**fields, **{fields["driver"]: own})


def write_sample_metrics(path):
    rng = np.random.default_rng(1)
    with MetricsWriter(path) as writer:
        for step in range(0, 6001, 100):
            phase = "dense" if step < 1000 else "admm" if step < 4000 else "retrain"
            if step == 4000:
                writer.write(step, "harden", accuracy=0.9651, test={"accuracy": 0.96}, loss=0.09)
            since = step if step < 4000 else step - 4000
            accuracy = 0.992 - (0.3 if step < 4000 else 0.02) * np.exp(-since / 300)
            extra = {}
            if phase == "admm":
                decay = {leaf: 600 + 200 * i for i, leaf in enumerate(SHAPES)}
                extra = {
                    "primal": {leaf: np.exp(-(step - 1000) / d) for leaf, d in decay.items()},
                    "dual": {leaf: 0.3 * np.exp(-(step - 1000) / d) * (step < 3800) for leaf, d in decay.items()},
                    "rho": dict.fromkeys(SHAPES, 0.001 * 10.0 ** ((step - 1000) // 1000)),
                }
            noise = rng.normal(0, 0.001)
            loss = float(np.exp(-step / 900) + 0.01)
            writer.write(
                step, phase, accuracy=accuracy, test={"accuracy": accuracy - 0.002 + noise}, loss=loss, **extra
            )
    return path


def sample_weights():
    rng = np.random.default_rng(0)
    before = {leaf: rng.normal(0, 0.05, shape).astype(np.float32) for leaf, shape in SHAPES.items()}
    after = {}
    for leaf, weight in before.items():
        cut = np.quantile(np.abs(weight), 1 - DENSITY.get(leaf, 0.07))
        after[leaf] = np.where(np.abs(weight) > cut, 2 * weight, 0)
    return before, after


def sample_layers(after):
    layers = [
        Layer(
            leaf, w.shape, "unstructured, density 0.0117", int(np.count_nonzero(w)), w.size, 4 * w.size,
            6 * int(np.count_nonzero(w)),
        )
        for leaf, w in after.items()
    ]  # fmt: skip
    return [*layers, Layer("params/Dense_1/bias", (10,), None, 10, 10, 40, 40)]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """The standard plots of the sample run, at full size."""
    folder = tmp_path_factory.mktemp("sample")
    records = read_metrics(write_sample_metrics(folder / "metrics.jsonl"))
    return run.standard_pictures(folder / "plots", records, *sample_weights())


@pytest.fixture
def sample():
    """The functions above under one roof."""

    class Sample:
        summary = staticmethod(sample_summary)
        metrics = staticmethod(write_sample_metrics)
        weights = staticmethod(sample_weights)
        layers = staticmethod(sample_layers)

    return Sample
