"""Structures between phases: chosen anew from hardened weights they take none away, or the phase refuses by name."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compressx as cx
from compressx import cli, formats
from compressx._harden import outside
from compressx.constraints.base import violations
from tests.constraints.test_contract import EXAMPLES, mostly_slow

_THREE = [[1, 3, 4, 5], [0, 1, 3, 4], [4, 5, 7, 8]]
SETS: dict[str, tuple[cx.Constraint, Any]] = {
    **EXAMPLES,
    "aligned patterns": (cx.pattern(_THREE, aligned=4), (3, 3, 8, 16)),
    "aligned patterns, a short group": (cx.pattern(_THREE, aligned=4), (3, 3, 5, 11)),
    "aligned patterns & unstructured": (cx.pattern(_THREE, aligned=4) & cx.unstructured(0.2), (3, 3, 8, 16)),
    "aligned connectivity": (cx.connectivity(0.4, aligned=4), (3, 3, 6, 10)),
    "aligned channels": (cx.pattern(k=4, aligned="channel"), (3, 3, 6, 8)),
    "aligned patterns of a library": (cx.pattern_connectivity(0.4, k=6, aligned=2), (3, 3, 6, 9)),
    "patterns & unstructured": (cx.pattern(k=8) & cx.unstructured(0.2), (3, 3, 8, 16)),
    "few patterns & unstructured": (cx.pattern("all", k=4) & cx.unstructured(0.15), (3, 3, 8, 8)),
    "patterns of a network & unstructured": (
        cx.pattern(k=6, scope="rule") & cx.unstructured(0.2, scope="rule"),
        ((3, 3, 4, 6), (3, 3, 6, 4)),
    ),
    "patterns & connectivity": (cx.pattern(k=6) & cx.connectivity(0.4), (3, 3, 6, 8)),
    "unstructured & polarize": (cx.unstructured(0.5) & cx.polarize(4), (3, 3, 8, 8)),
    "columns & polarize": (cx.columns(0.4) & cx.polarize(3, order="H"), (3, 3, 4, 5)),
    "sparse & polarize energy": (cx.unstructured(0.15) & cx.polarize(8, order="C", rule="energy"), (24, 7)),
    "darb permuted": (cx.darb(0.1, assignment="permuted"), (40, 64)),
    "darb inverse": (cx.darb(0.1, assignment="inverse"), (40, 64)),
    "darb uniform": (cx.darb(0.1, assignment="uniform"), (40, 64)),
    "darb & unstructured": (cx.darb(0.2) & cx.unstructured(0.1), (40, 32)),
    "darb & quantize": (cx.darb(0.2, axis="inputs") & cx.quantize(4), (24, 30)),
    "rows of a chain": (cx.bsp_rows(keep=3, strips=2, chained=True), (11, 7)),
    "columns, then rows": (cx.bsp_columns(0.4, strips=3) & cx.bsp_rows(keep=3, strips=2), (11, 7)),
    "quantize 8": (cx.quantize(8), (30, 40)),
    "quantize 12 a channel": (cx.quantize(12, per="channel"), (30, 8)),
    "quantize 16": (cx.quantize(16), (20, 20)),
    "powers of two": (cx.unstructured(0.3) & cx.quantize(5, grid="power_of_two"), (20, 20)),
    "codebook a channel": (cx.unstructured(0.4) & cx.quantize(3, grid="codebook", per="channel"), (30, 6)),
    "levels with zero": (cx.quantize(3, zero_level=True), (16, 16)),
    "unified, kept zeros, quantized": (
        cx.filters(0.5) & cx.unify((4, 1), 0.6, zeros="keep") & cx.quantize(5),
        (3, 3, 4, 6),
    ),
    "FORMS": (
        cx.filters(0.75) & cx.columns(0.75) & cx.polarize(4) & cx.quantize(8, grid="cells"),
        (3, 3, 4, 8),
    ),
    "patterns & polarize & quantize": (
        cx.pattern(k=6) & cx.unstructured(0.2) & cx.polarize(4) & cx.quantize(4),
        (3, 3, 6, 8),
    ),
}
# Of the examples, which other tests project too, those that choose; of the rest, one a choice.
QUICK = (
    "pattern aligned", "pattern network", "darb", "bsp_columns gates", "crossbar_aware", "network_structure",
    "polarize energy", "unify_and_prune",
    *(set(SETS) - set(EXAMPLES) - {
        "few patterns & unstructured", "darb inverse", "darb uniform", "quantize 8", "quantize 12 a channel",
        "patterns & polarize & quantize", "quantize 16", "darb permuted", "darb & unstructured",
        "patterns & connectivity", "sparse & polarize energy", "unified, kept zeros, quantized",
        "patterns & unstructured", "aligned patterns", "aligned patterns, a short group", "columns, then rows",
        "aligned patterns & unstructured", "unstructured & polarize", "levels with zero", "codebook a channel",
        "patterns of a network & unstructured", "aligned channels", "columns & polarize",
    }),
)  # fmt: skip


def draw(name: str, seed: int, kind: str = "normal") -> Any:
    constraint, shape = SETS[name]
    rng = np.random.default_rng(seed)
    out = []
    for s in shape if constraint.joint else (shape,):
        w = rng.standard_normal(s)
        if kind == "ties":
            w = rng.integers(-3, 4, s) * 0.25
        if kind == "sparse":
            w = w * (rng.random(s) < rng.choice([0.1, 0.3, 0.6]))
        if kind == "rows":
            w = w * np.exp(rng.standard_normal((*s[:-1], 1))) * (rng.random((*s[:-1], 1)) < 0.8)
        if kind == "columns":
            w = w * np.exp(2 * rng.standard_normal((1,) * (len(s) - 1) + s[-1:]))
        out.append(w.astype(np.float32))
    return tuple(out) if constraint.joint else out[0]


@functools.cache
def hardened(name: str) -> Callable[..., Any]:
    """Hardens, chooses the structure anew, freezes and retracts what was hardened: a step of nothing."""
    constraint = SETS[name][0]

    def run(w: Any) -> tuple[Any, Any, Any, Any]:
        z = constraint.project(w, constraint.init(w))
        anew = constraint.init(z)
        return z, violations(constraint, z, anew), constraint.retract(z, constraint.freeze(z, anew)), anew

    return jax.jit(run)


@mostly_slow(QUICK, tuple(SETS))
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["normal", "normal", "ties", "sparse", "rows", "columns"])
)
def test_structures_of_hardened_weights_leave_them_as_they_are_or_are_seen_not_to(
    name: str, seed: int, kind: str
) -> None:
    z, outside, back, anew = hardened(name)(draw(name, seed, kind))
    if outside:
        # hardened weights do not always tell with which choice they were hardened: refused then, by name (below)
        assert jax.tree.leaves(anew), f"{outside} entries outside, and the set chooses nothing"
        return
    for a, b in zip(jax.tree.leaves(z), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)


def numpy(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def equal(a: Any, b: Any) -> None:
    for x, y in zip(numpy(a), numpy(b), strict=True):
        np.testing.assert_array_equal(x, y)


def retrained(rules: Any, structure: Any, hard: Any, seed: int) -> Any:
    """A step of nothing, which must change nothing; then three of something, ending exactly inside."""
    tx = optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.05, momentum=0.9), cx.retrain(rules, structure))
    state = tx.init(hard)
    still = cx.retrain(rules, structure)
    updates, _ = still.update(jax.tree.map(jnp.zeros_like, hard), still.init(hard), hard)
    equal(optax.apply_updates(hard, updates), hard)
    equal(cx.retract(hard, rules, state).params, hard)
    moved = hard
    for k in range(3):
        noise = [jax.random.normal(jax.random.key(seed + k), w.shape) for w in jax.tree.leaves(hard)]
        updates, state = tx.update(jax.tree.unflatten(jax.tree.structure(hard), noise), state, moved)
        moved = optax.apply_updates(moved, updates)
    return cx.retract(moved, rules, state)


def inside(name: str, before: Any, after: Any) -> None:
    """What retraining may not change: positions closed by a support set or a polarized row, signs, the kept levels."""
    fixed = SETS[name][0].sets[-1].stage in (cx.TIE, cx.LEVEL)
    for a, b in zip(numpy(before), numpy(after), strict=True):
        signs = a * b >= 0
        if fixed:  # ties and levels keep their weights' signs, and levels every zero
            assert signs.all() and (SETS[name][0].stage != cx.LEVEL or ((a != 0) == (b != 0)).all())
        elif SETS[name][0].stage == cx.SIGN:
            assert signs.all()


@mostly_slow(("FORMS",), tuple(SETS))
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_phase_keeps_what_hardening_left(name: str, seed: int, tmp_path: Path) -> None:
    """harden, retrain, save, verify, load, retrain again: with the structures of hardening, and with none."""
    constraint = SETS[name][0]
    w = draw(name, seed)
    params = {f"layer{i}": x for i, x in enumerate(w if constraint.joint else [w])}
    rules = [("layer.*", constraint)]
    structure = cx.structures(params, rules)
    hard = cx.harden(params, rules, fresh=True).params
    for given in (structure, None):
        chosen = cx.structures(hard, rules) if given is None else given
        if given is None and any(outside(hard, rules, chosen).values()):
            assert jax.tree.leaves(chosen), "the set chooses nothing"
            text = rf"layer.*: \d+ entries outside {re.escape(str(constraint))}(.|\n)*harden\(params, rules, opt"
            with pytest.raises(cx.ConstraintViolation, match=text):
                cx.retrain(rules).init(hard)
            with pytest.raises(cx.ConstraintViolation, match=text):
                cx.check(hard, rules)
            with pytest.raises(cx.ConstraintViolation, match=text):
                cx.save_model(tmp_path / "refused", hard, rules)
            assert not (tmp_path / "refused").exists()
            continue
        after = retrained(rules, given, hard, seed)
        inside(name, hard, after.params)
        cx.check(after, rules)
        path = tmp_path / f"m{given is None}"
        cx.save_model(path, after, rules)
        assert cli.main(["verify", str(path)]) == 0
        back = formats.load_model(path)
        equal(back.params, after.params)
        assert not any(outside(back.params, back.rules, back.structures).values())
        again = retrained(back.rules, back.structures, back.params, seed + 9)
        inside(name, after.params, again.params)


def test_weights_that_were_never_hardened_are_refused_with_their_leaf(tmp_path: Path) -> None:
    params, rules = {"a": {"kernel": jnp.ones((4, 4))}, "b": jnp.ones(3)}, [("a/kernel", cx.unstructured(0.5))]
    text = r"a/kernel: 8 entries outside unstructured\(density=0.5, scope=leaf\)"
    with pytest.raises(cx.ConstraintViolation, match=text):
        cx.retrain(rules).init(params)
    with pytest.raises(cx.ConstraintViolation, match=text):
        cx.retrain(rules, {"a/kernel": ()}).init(params)
    with pytest.raises(cx.ConstraintViolation, match=text):
        cx.save_model(tmp_path / "m", params, rules)
    with pytest.raises(cx.ConstraintViolation, match=text):
        cx.check(params, rules)
    assert not list(tmp_path.iterdir())


def test_structures_of_other_weights_are_refused() -> None:
    rules = [("w", cx.pattern(k=2))]
    w, v = (jax.random.normal(jax.random.key(k), (3, 3, 4, 4)) for k in range(2))
    hard = cx.harden({"w": w}, rules, fresh=True).params
    cx.retrain(rules, cx.structures({"w": w}, rules)).init(hard)
    with pytest.raises(cx.ConstraintViolation, match="w: .* entries outside"):
        cx.retrain(rules, cx.structures({"w": v}, rules)).init(hard)


def test_where_init_is_traced_nothing_is_looked_at() -> None:
    rules = [("w", cx.unstructured(0.5))]
    params = {"w": jnp.ones((4, 4))}
    tx = cx.retrain(rules)
    shapes = jax.eval_shape(tx.init, params)
    assert shapes.active["w"].shape == (4, 4)
    assert jax.jit(tx.init)(params).active["w"].all()
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    assert jax.vmap(tx.init)(stacked).active["w"].shape == (2, 4, 4)
    with pytest.raises(cx.ConstraintViolation):
        tx.init(params)


def test_float64_is_checked_whole_where_jax_is_set_to_float32(tmp_path: Path) -> None:
    """1e-300 is 0 in float32, but a weight of the file."""
    w = np.full((4, 4), 1e-300)
    w[0, 0] = 1
    with pytest.raises(cx.ConstraintViolation, match="w: 15 entries outside"):
        cx.save_model(tmp_path / "m", {"w": w}, [("w", cx.unstructured(keep=1))])
    cx.save_model(tmp_path / "m", {"w": w}, [("w", cx.unstructured(keep=16))])
    assert cli.main(["verify", str(tmp_path / "m")]) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_denormals_are_weights_of_a_file(dtype: Any, tmp_path: Path) -> None:
    w = np.full((4, 4), jnp.finfo(dtype).smallest_subnormal, dtype)
    w[0, 0] = 1
    with pytest.raises(cx.ConstraintViolation, match="w: 15 entries outside"):
        cx.save_model(tmp_path / "m", {"w": w}, [("w", cx.unstructured(keep=1))])
    rules = [("w", cx.unstructured(keep=16) & cx.filters(keep=4))]
    equal(cx.harden({"w": w}, rules, fresh=True).params["w"], w)
    cx.save_model(tmp_path / "m", {"w": w}, rules)
    assert cli.main(["verify", str(tmp_path / "m")]) == 0
    np.testing.assert_array_equal(formats.load_model(tmp_path / "m").params["w"].view(np.uint8), w.view(np.uint8))
