"""A run of a few seconds with every kind of phase; as a script it can be made to kill itself at a step.

python tiny_run.py WORKDIR STEP|save:N|never
"""

import dataclasses
import os
import signal
import sys
import threading
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.common import data, training
from experiments.common.data import synthetic
from experiments.common.models.layers import BatchNorm
from experiments.common.training import Admm, Fit, Plan, Stage, Weights, phases


class Net(nn.Module):
    """Two dense layers with batch normalisation between."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(12, name="a")(x.reshape(x.shape[0], -1))
        x = nn.relu(BatchNorm(name="bn")(x, train=train))
        return nn.Dense(4, name="b")(x)


def rules(a, b):
    """Rules that keep so many weights of the two layers."""
    return tuple((f"params/{n}/kernel", {"kind": "unstructured", "keep": k}) for n, k in (("a", a), ("b", b)))


# every kind of phase: dense, admm, retrain with distillation, gradual, retrain
PLAN = Plan(
    dense=Fit(epochs=2, lr=1e-2),
    stages=(Stage(rules(100, 20), Admm(epochs=3, lr=1e-2, rho=1e-1, every=4), Fit(epochs=1, lr=3e-3, distill=0.5)),),
    baselines=("gradual",),
)
# 12 steps, and phases without any
SHORT = Plan(Fit(epochs=2, lr=1e-2), (Stage((("params/a/kernel", {"kind": "filters", "keep": 4}),), Admm(0), Fit(0)),))


def job(**changes):
    """The job: 96 training and 50 test images, 6 steps an epoch."""
    x, y = synthetic.images(0, "train", 96)
    xt, yt = synthetic.images(0, "test", 50)
    net = Net()

    variables = jax.jit(net.init)(jax.random.key(3), jnp.zeros((1, 8, 8, 1)))
    task = training.classification(
        net.apply, lambda v: data.augment.normalise(v, (0.5,), (0.25,)), data.augment.random_shift(1)
    )
    made = training.Job(
        task=task,
        first=Weights({"params": variables["params"]}, {"batch_stats": variables["batch_stats"]}, {}),
        train={"inputs": x, "labels": y},
        test={"inputs": xt, "labels": yt},
        seed=7,
        batch=16,
        eval_batch=16,
        chunk=4,
        save_steps=5,
        save_seconds=0,
    )
    return dataclasses.replace(made, **changes)


def few_steps(**changes):
    """The job with two steps an epoch under SGD, of which two compilations differ by rounding alone.

    Longer runs drift apart by as much as the processor likes, and so does every step of Adam, which follows the sign of
    a gradient however small it is.
    """
    whole = job()
    return job(**({"optimizer": "sgd", "train": {k: v[:32] for k, v in whole.train.items()}} | changes))


def run(workdir, display=None, plan=PLAN, make=job, **changes):
    """Trains, or goes on training, in a folder."""
    todo = phases.plan(plan)
    made = make(**changes)
    with display or training.Display(training.total_steps(made, todo), quiet=True) as shown:
        return training.train(made, todo, Path(workdir), shown)


class Killer(training.Display):
    """A display that kills the process when the run gets to a step."""

    def __init__(self, step):
        super().__init__(1, quiet=True)
        self.step = step

    def move(self, phase, step):
        """Kills, or does nothing."""
        if step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _kill_in_save(number):
    """Kills the process in its n-th save, as soon as a file of it is on the disk."""
    save, count = training.Checkpoints.save, [0]

    def watch(folder):
        while not any("tmp" in p.name and any(p.iterdir()) for p in folder.glob("*")):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(self, *args):
        count[0] += 1
        if count[0] == number:
            threading.Thread(target=watch, args=(self.folder / "steps",), daemon=True).start()
        save(self, *args)
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    training.Checkpoints.save = watched


if __name__ == "__main__":
    folder, when = sys.argv[1:]
    if when.startswith("save:"):
        _kill_in_save(int(when.removeprefix("save:")))
    run(folder, Killer(int(when)) if when.isdecimal() else None)
