"""metrics.jsonl: what is written comes back, a torn last line is survived, a resumed file equals a whole one."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.common.report import metrics


def _run(path, resumed_step=None, stop=20):
    """A deterministic stand-in for a training loop: two records at some steps, phases of 8, 8 and 4 steps."""
    start = 0 if resumed_step is None else resumed_step + 1
    with metrics.MetricsWriter(path, resumed_step) as writer:
        for step in range(start, stop):
            phase = "dense" if step < 8 else "admm" if step < 16 else "retrain"
            writer.write(step, phase, epoch=step // 4, loss=1.0 / (step + 1))
            if step % 3 == 0:
                writer.write(step, phase, accuracy=np.float32(step / 20), primal={"params/a/kernel": 0.5**step})


def test_records_come_back_with_numpy_and_jax_scalars(tmp_path):
    import jax.numpy as jnp

    path = tmp_path / "new" / "metrics.jsonl"
    with metrics.MetricsWriter(path) as writer:
        half = jnp.bfloat16(0.5)
        writer.write(np.int32(3), "dense", loss=jnp.float32(0.25), ok=True, name="é\n", n=[1, None], b=half)
    assert metrics.read_metrics(path) == [
        {"step": 3, "phase": "dense", "loss": 0.25, "ok": True, "name": "é\n", "n": [1, None], "b": 0.5}
    ]
    assert path.read_bytes().count(b"\n") == 1


def test_non_finite_numbers_are_strict_json_and_come_back(tmp_path):
    path = tmp_path / "m.jsonl"
    with metrics.MetricsWriter(path) as writer:
        writer.write(0, "NaN", loss=float("nan"), primal={"a": float("inf"), "b": np.float32("-inf")})
    json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    (record,) = metrics.read_metrics(path)
    assert math.isnan(record["loss"]) and record["primal"] == {"a": math.inf, "b": -math.inf}
    assert record["phase"] == "NaN"


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000), resumed=st.integers(-1, 19))
def test_a_file_torn_anywhere_resumes_to_the_same_bytes(tmp_path_factory, cut, resumed):
    folder = tmp_path_factory.mktemp("torn")
    whole, torn = folder / "whole.jsonl", folder / "torn.jsonl"
    _run(whole)
    data = whole.read_bytes()
    # The checkpoint of step `resumed` was saved after its records were synced, so at least those bytes survive.
    lines = data.splitlines(keepends=True)
    safe = sum(len(line) for line in lines if json.loads(line)["step"] <= resumed)
    kept = min(len(data), safe + cut % (len(data) - safe + 1))
    torn.write_bytes(data[:kept])
    assert len(metrics.read_metrics(torn)) == data[:kept].count(b"\n")
    _run(torn, resumed_step=resumed)
    assert torn.read_bytes() == data


def test_kill_9_in_the_middle_then_resume_gives_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    _run(whole)
    code = textwrap.dedent(
        """
        import itertools, sys
        from experiments.common.report.metrics import MetricsWriter
        writer = MetricsWriter(sys.argv[1])
        for step in itertools.count():
            writer.write(step, "dense", loss=1.0, blob="x" * 5000)
            print(step, flush=True)
        """
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(killed)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    seen = [int(child.stdout.readline()) for _ in range(50)]
    os.kill(child.pid, signal.SIGKILL)
    rest = child.communicate()[0]
    assert child.returncode == -signal.SIGKILL
    reported = max(seen + [int(line) for line in rest.splitlines()])
    assert metrics.read_metrics(killed)[-1]["step"] >= reported
    _run(killed, resumed_step=None)  # killed before the first checkpoint: the run starts anew
    assert killed.read_bytes() == whole.read_bytes()


def test_only_a_torn_last_line_is_forgiven(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 0, "phase": "a"}\n{"step": 1, "pha\n{"step": 2, "phase": "a"}\n')
    with pytest.raises(metrics.MetricsError, match=r"m\.jsonl, line 2"):
        metrics.read_metrics(path)
    path.write_bytes(b'{"step": 0, "phase": "a"}\n{"step": 1, "phase": "a"}')  # whole but for its newline: torn
    assert [r["step"] for r in metrics.read_metrics(path)] == [0]
    path.write_bytes(b"")
    assert metrics.read_metrics(path) == []
    for bad in (b"[1]\n", b'{"phase": "a"}\n', b'{"step": true}\n', b'{"step": 1.0}\n', b"\0\n", b"[" * 10**5 + b"\n"):
        path.write_bytes(bad)
        with pytest.raises(metrics.MetricsError, match="line 1"):
            metrics.read_metrics(path)


def test_steps_never_fall_also_across_a_resume(tmp_path):
    path = tmp_path / "m.jsonl"
    with metrics.MetricsWriter(path) as writer:
        writer.write(5, "dense")
        writer.write(5, "harden")
        with pytest.raises(metrics.MetricsError, match="step 4 after step 5"):
            writer.write(4, "dense")
    with pytest.raises(metrics.MetricsError, match="closed"):
        writer.write(6, "dense")
    with metrics.MetricsWriter(path, resumed_step=7) as writer:
        with pytest.raises(metrics.MetricsError, match="step 3 after step 5"):
            writer.write(3, "dense")
    assert len(metrics.read_metrics(path)) == 2


def test_resume_without_the_file_says_so(tmp_path):
    with pytest.raises(metrics.MetricsError, match="resumes at step 3"):
        metrics.MetricsWriter(tmp_path / "gone.jsonl", resumed_step=3)
    with pytest.raises(metrics.MetricsError, match="does not exist"):
        metrics.read_metrics(tmp_path / "gone.jsonl")


def test_series_and_phases(tmp_path):
    path = tmp_path / "m.jsonl"
    _run(path)
    records = metrics.read_metrics(path)
    loss = metrics.series(records, "loss")
    np.testing.assert_array_equal(loss.steps, np.arange(20))
    np.testing.assert_allclose(loss.values, 1.0 / np.arange(1, 21))
    assert metrics.series(records, "loss", phase="admm").steps.tolist() == list(range(8, 16))
    assert metrics.series(records, "primal.params/a/kernel").steps.tolist() == list(range(0, 20, 3))
    assert metrics.series(records, "nothing").steps.size == 0
    leaves = metrics.leaf_series(records, "primal")
    assert list(leaves) == ["params/a/kernel"]
    np.testing.assert_allclose(leaves["params/a/kernel"].values, 0.5 ** np.arange(0, 20, 3))
    assert list(metrics.leaf_series([{"step": 1, "rho": 2.0}], "rho")) == ["all leaves"]
    assert metrics.phases(records) == [("dense", 0, 7), ("admm", 8, 15), ("retrain", 16, 19)]
    assert metrics.phases([]) == []
