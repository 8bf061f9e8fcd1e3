"""A projection of a sharded leaf counts and sums; it never gathers the weights. Read off the compiled program."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, re
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import compressx as cx

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
out = {}


def moved(text):
    # bytes that the collectives of the compiled program produce, by kind
    found = {}
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    pattern = r"= \\(?(\\w+)\\[([\\d,]*)\\][^=]*? (" + kinds + r")\\("
    for dtype, dims, kind in re.findall(pattern, text):
        size = int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64)) if dims else 1
        found.setdefault(kind, []).append(size)
    return found


def case(name, constraint, arrays, specs):
    w = [jnp.asarray(a, jnp.float32) for a in arrays]
    spread = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(w, specs)]
    take = (lambda v: tuple(v)) if constraint.joint else (lambda v: v[0])
    run = jax.jit(lambda v: constraint.project(take(v), constraint.init(take(v))))
    compiled = run.lower(spread).compile()
    got, want = jax.tree.leaves(compiled(spread)), jax.tree.leaves(run(w))
    out[name] = {
        "collectives": moved(compiled.as_text()),
        "equal": all(bool((np.asarray(a) == np.asarray(b)).all()) for a, b in zip(got, want)),
        "sharded": all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in zip(got, spread)),
    }


matrix, conv = rng.standard_normal((64, 32)), rng.standard_normal((3, 3, 16, 32))
both, last = P("data", "model"), P(None, None, None, ("data", "model"))
case("unstructured", cx.unstructured(0.1), [matrix], [both])
case("unstructured global", cx.unstructured(0.1, scope="rule"), [matrix, conv], [both, last])
case("filters", cx.filters(0.5), [matrix], [both])
case("columns", cx.columns(0.5), [conv], [last])
case("channels", cx.channels(0.5), [conv], [last])

params = {"w": jax.device_put(jnp.asarray(matrix, jnp.float32), NamedSharding(mesh, both))}
tx = cx.admm([("w", cx.unstructured(0.1))], rho=0.1, every=1)
_, state = jax.jit(tx.update)(params, tx.init(params), params)
out["state"] = [x["w"].sharding.is_equivalent_to(params["w"].sharding, 2) for x in (*state.z, *state.u)]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, dict[str, object]]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# the largest result of any collective: one number per count, one energy per group
LARGEST = {"unstructured": 1, "unstructured global": 1, "filters": 32, "columns": 144, "channels": 16}


@pytest.mark.parametrize("name", list(LARGEST))
def test_no_leaf_is_gathered(seen: dict[str, dict[str, object]], name: str) -> None:
    collectives = seen[name]["collectives"]
    assert isinstance(collectives, dict)
    assert collectives, "a sharded selection must communicate"
    assert max(size for sizes in collectives.values() for size in sizes) <= LARGEST[name]


@pytest.mark.parametrize("name", list(LARGEST))
def test_eight_devices_give_the_same_bits_and_keep_the_sharding(seen: dict[str, dict[str, object]], name: str) -> None:
    assert seen[name]["equal"]
    assert seen[name]["sharded"]


def test_z_and_u_take_the_sharding_of_the_leaf(seen: dict[str, list[bool]]) -> None:
    assert seen["state"] == [True, True]
