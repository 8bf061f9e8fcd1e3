"""The benchmark of whole networks: which images it reads, and when."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx
from benchmarks import post_training
from compressx.reconstruction import Report
from experiments.common import data
from experiments.common.models import convert
from experiments.common.models.resnet import CifarResNet


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read and done, in order, with a small network and a reconstruction that only projects."""
    seen: list[str] = []

    def load(name: str, split: str) -> Any:
        seen.append(split)
        n = {"train": 40, "test": 12}[split]
        images = np.random.default_rng(n).integers(0, 255, (n, 8, 8, 3), np.uint8)
        held = SimpleNamespace(inputs=images, labels=np.arange(n) % 10)
        return type(
            "Split", (), {"__len__": lambda self: n, "take": lambda self, rows: cut(held, rows), **vars(held)}
        )()

    def cut(held: Any, rows: slice) -> Any:
        return SimpleNamespace(inputs=held.inputs[rows], labels=held.labels[rows])

    def reconstruct(model: Any, params: Any, rules: Any, batches: Any, **more: Any) -> Any:
        seen.append(f"reconstruct on {sum(map(len, batches))}")
        return cx.harden(params, rules, fresh=True), Report((), (), (), 1.0, 0.0, 0.0)

    model = CifarResNet(blocks=1, width=0.25)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr("experiments.common.data.source.find_file", lambda name: name)
    monkeypatch.setattr(convert, "load_cifar_resnet", lambda path: (model, variables))
    monkeypatch.setattr(cx, "reconstruct", reconstruct)
    monkeypatch.setattr(post_training, "HELD_OUT", 10)
    return seen


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
def test_test_images_stay_unread_until_the_end(read: list[str]) -> None:
    found = post_training.row(20, "unstructured_70", 0, 16)
    assert read == ["train", "reconstruct on 16", "test"]
    assert 0 <= found["projection"] <= 100 and found["projection"] == found["reconstructed"]


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
def test_variants_are_chosen_on_training_images_that_calibrate_nothing(read: list[str]) -> None:
    rows = list(post_training.choose("unstructured_70", 0, 30, ["block_match", "own_match"]))
    assert read == ["train", "reconstruct on 30", "reconstruct on 30"]
    assert [(r["target"], r["norms"]) for r in rows] == [("block", "match"), ("own", "match")]
    task = post_training.Task(20, 0, 30)
    calibrated = np.concatenate([np.asarray(b) for b in task.batches])
    held = np.asarray(task.prepared(task.held_out.inputs))
    assert len(held) == 10 and not any((x == y).all() for x in calibrated for y in held)
