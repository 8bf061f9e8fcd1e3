"""YOLOv3 at full width on the CPU: builds, runs, takes a training step, is pruned and compacted 36 times, in 8 GB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
LIMIT = 8e9  # bytes; measured: see docs/pneumonia.md

PROGRAM = """
import json, resource, time
import jax, jax.numpy as jnp, numpy as np
from compressx import compaction, detection, models
from compressx.harden import harden
from experiments.common.models import initial
from compressx.rules import paths

start, facts = time.process_time(), {}

def note(name):
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts[name] = {"cpu_seconds": time.process_time() - start, "peak_bytes": peak}

model, size = models.build("yolov3", classes=1), 64
x = jnp.asarray(np.random.default_rng(0).standard_normal((2, size, size, 3)), jnp.float32)
variables = initial.draw(model, x, 0)
params, stats = variables["params"], variables["batch_stats"]
facts["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
note("built")
geometry = detection.Geometry((size, size))
boxes, count = jnp.array([[[10.0, 12, 30, 40]], [[0, 0, 0, 0]]]), jnp.array([1, 0], jnp.int32)

def loss(params):
    heads, new = model.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
    return detection.yolo_loss(heads, boxes, jnp.zeros((2, 1), jnp.int32), count, geometry).mean(), new["batch_stats"]

@jax.jit
def step(params):
    (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return value, jax.tree.map(lambda p, g: p - 1e-4 * g, params, gradient), new

value, params, stats = step(params)
facts["loss"], facts["finite"] = float(value), all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(params))
note("step")
variables = {"params": params, "batch_stats": stats}
spec = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
found = compaction.groups(compaction.channels(model, variables, spec))
kept = compaction.amounts(found, compaction.kernels(found, variables), "combined", 36.0)
rules = compaction.structure_rules(found, {"params": params}, kept)
masked = {**variables, **harden({"params": params}, rules)}
facts["left"] = sum(int(jnp.count_nonzero(w)) for w in jax.tree.leaves(masked["params"]) if w.ndim == 4)
facts["all"] = kept.total
note("pruned")
small = compaction.compact(model, masked, spec)
packed, positions = compaction.gather(small.variables)
held = zip(paths(packed), jax.tree.leaves(packed))
facts["stored"] = sum(int(w.size) for path, w in held if path.endswith("kernel"))
want = jax.jit(lambda v: model.apply(v, x))(masked)
note("forward")
got = jax.jit(small.apply)(small.variables, x)
facts["gap"] = max(float(jnp.abs(a - b).max()) for a, b in zip(want, got))
facts["largest"] = max(float(jnp.abs(a).max()) for a in want)
note("compacted")
print(json.dumps(facts))
"""


@pytest.mark.slow
def test_the_whole_network_fits_and_is_compacted() -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["parameters"] == 61_523_734
    assert facts["finite"] and facts["loss"] > 0
    assert facts["all"] == 61_471_072 and 36 * 0.99 <= facts["all"] / facts["left"] <= 36 * 1.01
    assert facts["stored"] <= facts["left"]
    assert facts["gap"] < 1e-4 and facts["largest"] > 0.01
    assert all(v["peak_bytes"] < LIMIT for v in facts.values() if isinstance(v, dict))
