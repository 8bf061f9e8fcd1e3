"""The README's lines for a training loop, run as they stand there: train, harden, retrain, retract, save; then loaded.

    python .ci/three_lines.py README.md MODEL

`.ci/package.py` runs it where compressx is installed; nothing beyond what that brings is imported.
"""

import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import compressx


def main(readme: str, model: str) -> None:
    """Runs the lines with a network of one layer, and compares what is saved with what was trained."""
    assert "site-packages" in compressx.__file__, f"{compressx.__file__} is not what pip installed"
    text = Path(readme).read_text().partition("## In your own training loop")[2]
    train, after = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
    *before, harden = [line for line in train.splitlines() if line]
    retrain, *rest = [line for line in after.splitlines() if line]
    assert "compressx.harden(" in harden and "compressx.retrain(" in retrain and "save_model(" in rest[-1]
    key = jax.random.key(0)
    x = jax.random.normal(key, (64, 20))
    y = x @ jax.random.normal(jax.random.fold_in(key, 1), (20, 5))
    names = {
        "compressx": compressx,
        "optax": optax,
        "params": {"dense": {"kernel": jax.random.normal(key, (20, 5)), "bias": jnp.zeros(5)}},
    }

    def fit(steps: int) -> None:
        tx, params = names["tx"], names["params"]
        loss = lambda p: jnp.mean((x @ p["dense"]["kernel"] + p["dense"]["bias"] - y) ** 2)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(steps):
            params, state = step(params, state)
        names["params"], names["opt_state"] = params, state

    exec("\n".join(before), names)
    fit(1200)
    exec(harden, names)
    exec(retrain, names)
    names["params"] = names["hard"].params
    fit(50)
    os.chdir(Path(model).parent)
    exec("\n".join(rest), names)
    Path("compressed.safetensors").rename(model)
    saved, kept = compressx.load_model(model), names["hard"].params
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), kept, saved.params)))
    assert np.count_nonzero(saved.params["dense"]["kernel"]) == 10  # a tenth of 100


if __name__ == "__main__":
    main(*sys.argv[1:])
