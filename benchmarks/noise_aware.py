"""Accuracy under device variation of a small network, trained plainly and through freshly drawn devices.

    python -m benchmarks.noise_aware [--sigma=0.5] [--seeds=3] [--steps=300] [--devices=20]

Digits of scikit-learn (1,400 for training, 397 for testing), a network 64-24-10 with 4-bit weights on differential
columns, log-normal cells. Both trainings run through the same rounding for the same steps; one of them draws devices.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from compressx.crossbar import Adc, Design, aware, layers, network
from compressx.crossbar.noise import Variation, monte_carlo

DESIGN = Design(adc=Adc(10), weight_bits=4, input_bits=8, signs="differential_digital")
TRAIN = 1400
INPUT_STEPS = {"a": 1 / 255, "b": 8 / 255}


class Net(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(10, name="b")(nn.relu(nn.Dense(24, name="a")(x)))


def steps(variables: dict) -> dict:
    """The step of each layer's weights: its largest weight is the highest level."""
    return {n: jnp.max(jnp.abs(variables["params"][n]["kernel"])) / 15 for n in INPUT_STEPS}


def accuracies(seed: int, spread: Variation | None, options: argparse.Namespace) -> tuple[float, float]:
    """Trains a network and scores it on ideal cells, and in the mean over drawn devices."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
    variables = Net().init(jax.random.key(seed), x[:1])
    tx = optax.adam(3e-3)
    state = tx.init(variables)

    def loss(variables: dict, images: jax.Array, key: jax.Array) -> jax.Array:
        scales = steps(variables)
        targets = {n: aware.Target(DESIGN, scales[n], INPUT_STEPS[n]) for n in scales}
        with aware.training_hardware(targets, key, spread):
            logits = Net().apply(variables, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(y[:TRAIN])).mean()

    @jax.jit
    def step(variables: dict, state: optax.OptState, images: jax.Array, key: jax.Array) -> tuple:
        updates, state = tx.update(jax.grad(loss)(variables, images, key), state, variables)
        return optax.apply_updates(variables, updates), state

    for i in range(options.steps):
        variables, state = step(variables, state, x[:TRAIN], jax.random.fold_in(jax.random.key(seed), i))
    grid = network.on_grid(
        variables,
        dict.fromkeys(INPUT_STEPS, network.levels_of(DESIGN)),
        {n: float(s) for n, s in steps(variables).items()},
    )
    scales, _ = layers.calibrate(Net().apply, DESIGN, grid.variables, x[:TRAIN])
    deployed = network.deploy_network(grid, dict.fromkeys(INPUT_STEPS, DESIGN), scales, prove=False)
    score, batched = network.make_scorer(Net().apply), network.batches(x[TRAIN:], y[TRAIN:], 397)
    drawn = Variation(sigma=options.sigma)
    metric = network.noisy_accuracy(score, deployed, grid.variables, batched, drawn)
    ideal = network.accuracy(score, deployed, grid.variables, batched)
    return ideal, monte_carlo(metric, jax.random.key(1000), options.devices).mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sigma", type=float, default=0.5)
    for name, value in (("seeds", 3), ("steps", 300), ("devices", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    for name, spread in (("plain", None), ("noise-aware", Variation(sigma=options.sigma))):
        found = np.array([accuracies(seed, spread, options) for seed in range(options.seeds)])
        ideal, noisy = 100 * found.T
        print(
            f"{name:12} ideal cells {ideal.mean():.1f} %, sigma {options.sigma}: {noisy.mean():.1f} % "
            f"({', '.join(f'{v:.1f}' for v in noisy)})",
            flush=True,
        )


if __name__ == "__main__":
    main()
