"""What the benchmarks compute besides times: installs reported, cases, ratios within a round."""

import pytest

from benchmarks import install_peers, speech_step


def test_installs_are_reported_with_their_reason():
    pip = "Collecting x\nERROR: Could not find a version of x\nERROR: No matching distribution found for x\n"
    ended = "  x 'deepsparse' has reached end-of-life\n  ERROR: Failed building wheel\n"
    said = {"onnx": (0, ""), "torch": (1, pip), "deepsparse": (1, ended), "MNN": (0, "")}
    imports = {"onnx": (0, "noise\n1.2.3\n"), "MNN": (1, "Traceback\nImportError: libMNN.so is missing\n")}

    def command(words):
        return said[words[-1]] if "pip" in words else next(v for k, v in imports.items() if k in words[-1])

    assert install_peers.install("onnx", command) == (True, "1.2.3")
    assert install_peers.install("torch", command) == (False, "not installed: " + "; ".join(pip.splitlines()[1:]))
    there, why = install_peers.install("deepsparse", command)
    assert not there and why.startswith("not installed: x 'deepsparse' has reached end-of-life; ERROR: Failed")
    assert install_peers.install("MNN", command) == (
        False,
        "installed, not imported: ImportError: libMNN.so is missing",
    )


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
