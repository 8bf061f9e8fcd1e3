"""What the benchmarks compute besides times: installs reported, cases, ratios within a round."""

import argparse
import sys

import numpy as np
import pytest

from benchmarks import deepsparse, install_peers, pallas, peers, recurrent, speech_step, tvm_schedule


def test_installs_are_reported_with_their_reason():
    pip = "Collecting x\nERROR: Could not find a version of x\nERROR: No matching distribution found for x\n"
    ended = "  x 'deepsparse' has reached end-of-life\n  ERROR: Failed building wheel\n"
    said = {"onnx": (0, ""), "torch": (1, pip), deepsparse.RELEASE: (1, ended), "MNN": (0, "")}
    imports = {"onnx": (0, "noise\n1.2.3\n"), "MNN": (1, "Traceback\nImportError: libMNN.so is missing\n")}

    def command(words):
        if words[1:3] == ["-m", "venv"]:
            return 0, ""
        return said[words[-1]] if "pip" in words else next(v for k, v in imports.items() if k in words[-1])

    assert install_peers.install("onnx", command) == (True, "1.2.3")
    assert install_peers.install("torch", command) == (False, "not installed: " + "; ".join(pip.splitlines()[1:]))
    there, why = install_peers.install("deepsparse", command)
    assert not there and why.startswith("not installed: x 'deepsparse' has reached end-of-life; ERROR: Failed")
    assert install_peers.install("MNN", command) == (
        False,
        "installed, not imported: ImportError: libMNN.so is missing",
    )


def test_a_peer_in_a_process_of_its_own_answers_and_says_why_it_does_not(tmp_path, monkeypatch):
    engine = "class Engine:\n    def __init__(self, *a, **k): pass\n    def run(self, x): return [2 * x[0]]\n"
    (tmp_path / "deepsparse").mkdir()
    (tmp_path / "deepsparse" / "__init__.py").write_text(engine)
    monkeypatch.setattr(deepsparse, "PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    x = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    run = deepsparse.Step(b"", x, 1)
    for _ in range(2):
        np.testing.assert_array_equal(run(), 2 * x.transpose(0, 3, 1, 2))
    (tmp_path / "deepsparse" / "__init__.py").write_text("raise ImportError('no engine for this processor')")
    with pytest.raises(RuntimeError, match="no engine for this processor"):
        deepsparse.Step(b"", x, 1)


def test_a_command_that_fails_tells_its_status_and_output():
    assert install_peers.run(["sh", "-c", "echo said; echo too >&2; exit 3"]) == (3, "said\ntoo\n")


def test_unknown_peers_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["install_peers", "--peers=nothing"])
    with pytest.raises(SystemExit):
        install_peers.main()
    assert "no peer nothing" in capsys.readouterr().err


def test_speech_steps_are_compared_within_a_round_and_only_natively():
    dense, ours = [2.0, 9.0, 12.0], [1.0, 3.0, 6.0]  # ratios 2, 3, 2; of medians 9 / 3
    row = speech_step.times(dense, ours, True)
    assert row["step_ms"]["median"] == 3000 and row["dense_over_this"]["median"] == 2
    assert speech_step.times(dense, ours, False) == {"step_ms": row["step_ms"]}


@pytest.mark.parametrize("average", [True, False])
def test_heads_are_the_same_network_in_onnx(average):
    import jax
    import jax.numpy as jnp

    from compressx.kernels import graph
    from compressx.trace import trace

    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    v = {"k": draw(3, 3, 2, 5), "linear": [(draw(5 if average else 60, 6), draw(6)), (draw(6, 4), draw(4))]}

    def forward(v, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, v["k"], (2, 2), "SAME", dimension_numbers=numbers)
        y = y.mean((1, 2)) if average else y.reshape(len(y), -1)
        (a, b), (c, d) = v["linear"]
        return jnp.maximum(y @ a + b[None], 0) @ c + d[None]

    x = draw(1, 8, 6, 2)
    program = trace(forward, v, x)
    fused = [s for s in graph.steps(program, v)[0] if not isinstance(s, graph.Other)]
    model = peers.onnx_bytes(fused, peers.Head(v["linear"], average), x.shape, program.inputs[0])
    np.testing.assert_allclose(peers.ort_step(model, x, 1)(), jax.jit(forward)(v, x), atol=1e-4)


def test_recurrent_rows_of_a_saved_network(tmp_path):
    import jax
    import jax.numpy as jnp

    import compressx
    from experiments.common import models

    model = models.build("gru", classes=5, hidden=24)
    params = jax.device_get(model.init(jax.random.key(0), jnp.zeros((1, 1, 6))))
    for layer in ("gru_0", "gru_1"):
        for gate in "zrh":
            w = np.array(params["params"][layer][f"u{gate}"])
            w[::2] = 0
            params["params"][layer][f"u{gate}"] = w
    file = tmp_path / "tones" / "seed0" / "compressed.safetensors"
    file.parent.mkdir(parents=True)
    compressx.save_model(file, params, layout=[(".*/u[zrh]", "bspc")])
    args = argparse.Namespace(threads=1, steps=3, rounds=2)
    rows = recurrent.saved(file, args)
    assert list(rows) == ["model-tones-seed0-gru_0-1t", "model-tones-seed0-gru_1-1t"]
    for row in rows.values():
        assert row["format"] == "bspc" and row["hidden"] == 24 and row["rate_counted"] == 2
        assert ("jax_over_ours" in row) == (row["path"] != "xla")
    compressx.save_model(file, {"w": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match="saved GRU"):
        recurrent.saved(file, args)


def test_pallas_is_compared_and_timed_on_a_device_alone(monkeypatch, capsys):
    import jax

    if jax.default_backend() != "cpu":
        pytest.skip("there is a device")
    monkeypatch.setattr("sys.argv", ["pallas"])
    assert pallas.main() == 1 and "No GPU or TPU" in capsys.readouterr().err
    row = pallas.compare("32x9x32", 0.3, 1, 2)  # interpreted, as `main` never does
    assert row["path"] == "pallas/interpret" and row["share"] == pytest.approx(3 / 9)
    assert {"ours_ms", "xla_ms", "xla_exact_ms", "xla_over_ours"} <= row.keys()


def test_the_hand_made_schedule_is_the_convolution():
    import jax
    import jax.numpy as jnp

    from compressx.kernels import graph
    from compressx.trace import trace

    pytest.importorskip("tvm", reason="TVM is not installed: make peers")
    rng = np.random.default_rng(0)
    v = {"a": rng.standard_normal((3, 3, 3, 16), np.float32), "b": rng.standard_normal((3, 3, 16, 32), np.float32)}

    def forward(v, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.nn.relu(jax.lax.conv_general_dilated(x, v["a"], (1, 1), "SAME", dimension_numbers=numbers))
        y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jax.lax.conv_general_dilated(y, v["b"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=numbers)

    x = rng.standard_normal((1, 12, 10, 3), np.float32)
    steps, _ = graph.steps(program := trace(forward, v, x), v)
    run = tvm_schedule.step(steps, x, program.inputs[0], 1)
    for _ in range(2):
        np.testing.assert_allclose(run().transpose(0, 2, 3, 1), np.asarray(forward(v, x)), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="chains"):
        tvm_schedule.step([steps[0], steps[0]], x, program.inputs[0], 1)
