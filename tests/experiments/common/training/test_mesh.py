"""Layouts over devices, and that two devices, or two processes, end where one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.common.report.metrics import read_metrics
from experiments.common.training import Fit, Plan, mesh
from experiments.common.training.config import Admm, Stage

# Sums over a batch are taken in another order on two devices. Over instruction sets from SSE4.2 to AVX2, both levels of
# optimization and two releases of XLA, figures differed by up to 2e-7.
TOLERANCE = 2e-5


def _plan(tiny) -> Plan:
    stage = Stage(tiny.rules(100, 20), Admm(epochs=2, lr=1e-2, every=2), Fit(epochs=1, lr=1e-2))
    return Plan(Fit(epochs=2, lr=1e-2), (stage,))


def test_reads_its_text() -> None:
    assert mesh.parse("") == {}
    assert mesh.parse("data=4,model=2") == {"data": 4, "model": 2}


@pytest.mark.parametrize("text", ["4", "data", "data=0", "data=x", "rows=2", "data=2,data=2", "data=-1"])
def test_refuses_what_is_no_mesh(text) -> None:
    with pytest.raises(ValueError, match=f"--mesh={text}: .* is not an axis; write for example data=2"):
        mesh.parse(text)


def test_refuses_more_devices_than_there_are() -> None:
    with pytest.raises(ValueError, match="takes 64 devices, and there are 2"):
        mesh.make("data=64")


def test_the_layout_follows_the_largest_axis_that_divides() -> None:
    place = mesh.make("model=2")
    assert place.spec((5, 8, 6)) == P(None, "model")
    assert place.spec((4, 4)) == P("model")
    assert place.spec((3, 5)) == P()
    assert place.spec(()) == P()
    assert mesh.make("data=2").spec((8, 8)) == P()
    assert mesh.make().spec((8, 8)) == P()


def test_putting_never_shares_a_buffer() -> None:
    x = jnp.arange(8.0)
    for place in (mesh.make(), mesh.make("data=2"), mesh.make("model=2")):
        y = place.put({"x": x, "k": jax.random.key(1)})
        jax.jit(lambda t: t["x"] + 1, donate_argnums=0)(y)
        np.testing.assert_array_equal(x, np.arange(8.0))


def test_a_batch_must_split_evenly() -> None:
    with pytest.raises(ValueError, match="batch=15 cannot be split over data=2 devices"):
        mesh.make("data=2").check_batch(15)
    mesh.make("model=2").check_batch(15)


@pytest.mark.parametrize("args", [("", 2, 0), ("", 1, 1), ("host:1", 2, 2), ("host:1", 0, 0)])
def test_processes_need_numbers_that_make_sense(args) -> None:
    with pytest.raises(ValueError, match="--"):
        mesh.start_processes(*args)


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory):
    """The records of the run on one device."""
    folder = tmp_path_factory.mktemp("single")
    return tiny.run(folder, plan=_plan(tiny), make=tiny.few_steps), _records(folder)


def _records(folder):
    return [(r["phase"], r["epoch"], r.get("loss", r["test_loss"])) for r in read_metrics(folder / "metrics.jsonl")]


def _compare(records, want) -> None:
    assert [r[:2] for r in records] == [r[:2] for r in want]
    np.testing.assert_allclose([r[2] for r in records], [r[2] for r in want], rtol=TOLERANCE)


@pytest.mark.parametrize("text", ["data=2", pytest.param("model=2", marks=pytest.mark.slow)])
def test_two_devices_end_where_one_does(tiny, single, tmp_path, text) -> None:
    outcome = tiny.run(tmp_path, plan=_plan(tiny), make=tiny.few_steps, placement=mesh.make(text))
    _compare(_records(tmp_path), single[1])
    for name, figures in outcome.results.items():
        assert figures["end"]["test_loss"] == pytest.approx(single[0].results[name]["end"]["test_loss"], rel=TOLERANCE)


def test_state_is_laid_out_as_its_leaves_are() -> None:
    place = mesh.make("model=2")
    tree = place.put({"w": jnp.zeros((4, 6)), "m": {"w": jnp.zeros((4, 6))}, "n": jnp.int32(0)})
    kept = jax.jit(place.keep)(jax.tree.map(lambda x: x + 1, tree))
    assert kept["w"].sharding == kept["m"]["w"].sharding
    assert kept["w"].sharding.spec == P(None, "model")
    assert kept["n"].sharding.is_fully_replicated


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_processes_end_where_one_does(tiny, single, tmp_path) -> None:
    script = tmp_path / "process.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(Path(tiny.__file__).parent)!r})
from experiments.common.training import mesh
number, port = int(sys.argv[1]), sys.argv[2]
mesh.start_processes("localhost:" + port, 2, number)
import json
import tiny_run
from experiments.common.training import Admm, Fit, Plan, Stage
stage = Stage(tiny_run.rules(100, 20), Admm(epochs=2, lr=1e-2, every=2), Fit(epochs=1, lr=1e-2))
told = dict(plan=Plan(Fit(epochs=2, lr=1e-2), (stage,)), make=tiny_run.few_steps, placement=mesh.make("data=2"))
out = tiny_run.run({str(tmp_path / "run")!r}, **told)
again = tiny_run.run({str(tmp_path / "run")!r}, **told)
assert again.results == out.results
print(json.dumps(out.results))
"""
    )
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[4])}
    port = str(_free_port())
    children = [
        subprocess.Popen([sys.executable, str(script), str(n), port], env=env, stdout=-1, stderr=-1, text=True)
        for n in (0, 1)
    ]
    answers = [c.communicate(timeout=300) for c in children]
    for c, (_, err) in zip(children, answers, strict=True):
        assert c.returncode == 0, err
    results = [json.loads(out.splitlines()[-1]) for out, _ in answers]
    assert results[0] == results[1]
    _compare(_records(tmp_path / "run"), single[1])
