"""The contract of a constraint, to run on one of one's own: what ADMM, hardening, retraining and saving rely on.

    from compressx import testing

    def test_my_set():
        testing.check_constraint(my_set(0.5), jnp.zeros((8, 6)))

Every check is a method of `Contract` that raises an `AssertionError`; `check_constraint` runs all of them.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compressx import schedules
from compressx._admm import admm
from compressx._admm_state import metrics as admm_metrics
from compressx._retrain import retrain
from compressx.constraints.base import LEVEL, TIE, Constraint, violations

# An intersection in which two sets together settle between each other needs a dual that grows with rho.
_STEPS, _EVERY, _NEAR = 600, 10, 0.2


def check_constraint(constraint: Constraint, like: Any, *, nearest: bool = True, seed: int = 0) -> None:
    """Runs every check of the contract.

    Args:
      constraint: the set.
      like: a leaf it applies to (a tuple of leaves where it is joint), of which shapes and dtypes are taken.
      nearest: whether its projection is claimed to be the nearest point; False for heuristics and intersections.
      seed: of the weights that are drawn.

    Raises:
      AssertionError: a property does not hold; the text begins with its name.

    Example:
      >>> import jax.numpy as jnp
      >>> from compressx import filters
      >>> check_constraint(filters(0.5), jnp.zeros((4, 6)))
    """
    contract = Contract(constraint, like, seed)
    for name in CHECKS:
        if name == "nearest" and not nearest:
            continue
        try:
            getattr(contract, name)()
        except AssertionError as error:
            raise AssertionError(f"{name}: {constraint}: {error}") from None


class Contract:
    """A constraint with weights drawn for it; its functions are compiled once for all checks.

    Args:
      constraint: the set.
      like: a leaf it applies to (a tuple of leaves where it is joint), of which shapes and dtypes are taken.
      seed: of the weights that are drawn.

    Example:
      >>> contract = Contract(compressx.filters(0.5), jnp.zeros((4, 6)))
      >>> contract.draw().shape
      (4, 6)
      >>> contract.spec()  # one check alone: an AssertionError where it does not hold
    """

    def __init__(self, constraint: Constraint, like: Any, seed: int = 0) -> None:
        self.constraint, self.like, self.seed = constraint, like, seed

    def draw(self, seed: int = 0, dtype: Any = None) -> Any:
        """Weights of a normal distribution, shaped like the example."""
        rng = np.random.default_rng([self.seed, seed])
        return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), dtype or x.dtype), self.like)

    def run(self, w: Any) -> Any:
        """The weights projected, with the structure chosen for them."""
        return self.constraint.project(w, self.constraint.init(w))

    @functools.cached_property
    def jitted(self) -> dict[str, Callable[..., Any]]:
        """The functions of the constraint, and `run` and `violations`, compiled when they are first called."""
        c = self.constraint
        functions = {name: getattr(c, name) for name in ("init", "project", "refresh", "freeze", "retract")}
        functions |= {"run": self.run, "violations": functools.partial(violations, c)}
        return {name: jax.jit(f) for name, f in functions.items()}

    @functools.cached_property
    def hardened(self) -> tuple[Any, Any]:
        """Projected weights and their structure."""
        w = self.draw()
        structure = self.jitted["init"](w)
        return self.jitted["project"](w, structure), structure

    def feasible(self) -> None:
        """A projected weight lies in the set, to the bit, and a drawn one does not."""
        z, structure = self.hardened
        _same(self.jitted["project"](z, structure), z)
        assert int(self.jitted["violations"](z, structure)) == 0, "a projected weight violates the set"
        assert int(self.jitted["violations"](self.draw(), structure)) > 0, "a drawn weight lies in the set"

    def nearest(self) -> None:
        """None of some other points of the set is nearer to the weight than its projection is."""
        w = self.draw()
        _, structure = self.hardened
        best = _squared(self.jitted["project"](w, structure), w)
        for seed in range(1, 20):
            mix = jax.tree.map(lambda a, b: a + 0.3 * b, w, self.draw(seed))
            assert _squared(self.jitted["project"](mix, structure), w) >= best * (1 - 1e-6), "a nearer point was found"

    def shapes(self) -> None:
        """Shapes and dtypes are kept, of float32 and of bfloat16."""
        for dtype in (jnp.float32, jnp.bfloat16):
            w = self.draw(dtype=dtype)
            for a, b in zip(jax.tree.leaves(jax.eval_shape(self.run, w)), jax.tree.leaves(w), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{b.dtype} {b.shape} becomes {a.dtype} {a.shape}"

    def eager(self) -> None:
        """Compiled it gives the bits that it gives step by step, there with NumPy's arrays, as a file has them."""
        w = self.draw()
        _same(self.jitted["run"](w), self.run(jax.tree.map(np.asarray, w)))

    def mapped(self) -> None:
        """Under `jax.vmap` every weight is projected as it is alone (means and scales to their last bit)."""
        ws = [self.draw(seed) for seed in range(3)]
        got = jax.jit(jax.vmap(self.run))(jax.tree.map(lambda *x: jnp.stack(x), *ws))
        want = jax.tree.map(lambda *x: jnp.stack(x), *[self.jitted["run"](w) for w in ws])
        if self.constraint.stage not in (TIE, LEVEL):
            return _same(got, want)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        return None

    def zeros(self) -> None:
        """A weight of zeros stays as it is."""
        w = jax.tree.map(jnp.zeros_like, self.draw())
        _same(self.jitted["run"](w), w)

    def spec(self) -> None:
        """Its spec passes through JSON as it is."""
        spec = dict(self.constraint.spec)
        assert json.loads(json.dumps(spec)) == spec, "the spec is not what JSON gives back: mark its function @factory"

    def active(self) -> None:
        """Retraining moves only inside the active set: against weight decay and momentum what is 0 stays exactly 0."""
        z, structure = self.hardened
        active = self.jitted["freeze"](z, structure)
        retract = self.jitted["retract"]
        _same(retract(z, active), z)
        inside = retract(jax.tree.map(lambda a, b: a + 0.1 * b, z, self.draw(5)), active)
        _same(retract(inside, active), inside)
        joint = self.constraint.joint
        params = list(z) if joint else [z]
        chosen = {".*" if joint else "0": structure}
        stay = retrain([(".*", self.constraint)], chosen)
        tx = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1e-2, momentum=0.9), stay)
        state = tx.init(params)
        update = jax.jit(tx.update)
        for seed in range(3):
            gradient = self.draw(10 + seed)
            updates, state = update(list(gradient) if joint else [gradient], state, params)
            params = optax.apply_updates(params, updates)
        after = tuple(params) if joint else params[0]
        for free, x in zip(jax.tree.leaves(_free(z, retract, active)), jax.tree.leaves(after), strict=True):
            assert bool(jnp.all(jnp.where(free, True, x == 0))), "a weight outside the active set has moved"

    def compiled_once(self) -> None:
        """A second weight of the same shape compiles nothing."""
        project = self.jitted["run"]
        project(self.draw(0))
        project(self.draw(1))
        assert project._cache_size() == 1, "a second call compiles again"  # type: ignore[attr-defined]

    def trained(self) -> None:
        """ADMM moves the weights of a quadratic loss into the set: every primal residual ends below 0.2."""
        target = self.draw(3)
        rho = schedules.staged(0.1, 1.15, 1, 20.0)
        move = admm([(".*", self.constraint)], rho=rho, every=_EVERY, rescale_dual=False)
        tx = optax.chain(move, optax.sgd(0.02))

        def body(carry: Any, _: None) -> tuple[Any, None]:
            p, s = carry
            updates, s = tx.update({"w": jax.tree.map(jnp.subtract, p["w"], target)}, s, p)
            return (optax.apply_updates(p, updates), s), None

        start = {"w": target}
        (_, state), _ = jax.jit(lambda c: jax.lax.scan(body, c, None, length=_STEPS))((start, tx.init(start)))
        far = max(float(v) for k, v in admm_metrics(state).items() if k.startswith("primal"))
        assert far < _NEAR, f"the primal residual ends at {far:.3g}"


CHECKS = (
    "feasible",
    "nearest",
    "shapes",
    "eager",
    "mapped",
    "zeros",
    "spec",
    "active",
    "compiled_once",
    "trained",
)


def _same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def _squared(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(np.sum(np.square(np.asarray(x, np.float64) - np.asarray(y, np.float64)))) for x, y in pairs)


def _free(z: Any, retract: Callable[..., Any], active: Any) -> Any:
    """Where a projected weight may be non-zero: non-zeros, and members of kept groups that happen to be 0."""
    up, down = (retract(jax.tree.map(lambda x, a=a: jnp.full_like(x, a), z), active) for a in (1.0, -1.0))
    return jax.tree.map(lambda a, b, v: (a != 0) | (b != 0) | (v != 0), up, down, z)


__all__ = ["CHECKS", "Contract", "check_constraint"]
