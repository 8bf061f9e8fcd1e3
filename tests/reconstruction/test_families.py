"""Every family of constraints: exactly in its set, with structures that `check` takes, no worse than a projection."""

import importlib.util
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx
from compressx.capture.matrix import Gram, matrix_view
from compressx.reconstruction.settings import Settings
from compressx.reconstruction.solve import solve, solve_joint


def _contract() -> ModuleType:
    """The table of families, which is a test's."""
    path = Path(__file__).parents[1] / "constraints" / "test_contract.py"
    spec = importlib.util.spec_from_file_location("families_of_contract", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLES = _contract().EXAMPLES
# one of each stage, one over several leaves; the rest compile for minutes together
QUICK = ("n_of_m & columns", "polarize energy", "unify", "unstructured global")
ROWS = 300


def gram(rng: np.random.Generator, inputs: int) -> Gram:
    x = rng.standard_normal((ROWS, inputs)) @ rng.standard_normal((inputs, inputs))
    return Gram((x.T @ x / ROWS)[None], ROWS, x.mean(0)[None])


def refitted(h: np.ndarray, a: np.ndarray, mask: np.ndarray) -> float:
    """The error of the best weights on a support: normal equations in float64."""
    w = np.zeros_like(a)
    for j in range(a.shape[1]):
        kept = np.flatnonzero(mask[:, j])
        w[kept, j] = np.linalg.lstsq(h[np.ix_(kept, kept)], (h @ a[:, j])[kept], rcond=None)[0]
    return float(np.einsum("pf,pf->", w - a, h @ (w - a)) / np.einsum("pf,pf->", a, h @ a))


def errors(ws: list, grams: list, zs: list, refit: bool) -> float:
    each = []
    for w, g, z in zip(ws, grams, zs, strict=True):
        a, m = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (w, z))
        d, h = m - a, g.h[0]
        whole = np.einsum("pf,pf->", a, h @ a)
        each.append(refitted(h, a, m != 0) if refit else float(np.einsum("pf,pf->", d, h @ d) / whole))
    return float(np.mean(each))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EXAMPLES])
def test_every_family(name: str) -> None:
    constraint, shape = EXAMPLES[name]
    rng = np.random.default_rng(0)
    shapes = shape if constraint.joint else (shape,)
    ws = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]
    grams = [gram(rng, matrix_view(s).rows) for s in shapes]
    if constraint.joint:
        found = solve_joint(ws, grams, constraint)
        hard, rules = cx.Hardened(list(found.w), {".*": found.structure}), [(".*", constraint)]
        own: tuple | jax.Array = tuple(ws)
    else:
        found = solve(ws[0], grams[0], constraint)
        hard, rules = cx.Hardened({"w": found.w}, {"w": found.structure}), [("w", constraint)]
        own = ws[0]
    cx.check(hard, rules)
    z = constraint.project(own, constraint.init(own))
    zs = list(z) if constraint.joint else [z]
    assert found.error <= errors(ws, grams, zs, refit=False) * (1 + 1e-5)
    if all(part.stage == cx.SUPPORT for part in constraint.sets):
        # a share of 1 % is what damping H may cost a refit
        assert found.error <= errors(ws, grams, zs, refit=True) * 1.01
    assert found.error == min(found.tried.values())
    solved = list(found.w) if constraint.joint else [found.w]
    assert found.error == pytest.approx(errors(ws, grams, solved, refit=False), rel=1e-5)


def test_one_z_and_a_z_for_each_set_are_both_tried() -> None:
    rng = np.random.default_rng(1)
    w, g = jnp.asarray(rng.standard_normal((8, 6)), jnp.float32), gram(rng, 8)
    constraint = cx.n_of_m(2, 4) & cx.columns(0.5)
    found = solve(w, g, constraint, settings=Settings())
    assert {"admm", "admm each"} <= set(found.tried)
    cx.check(cx.Hardened({"w": found.w}, {"w": found.structure}), [("w", constraint)])
