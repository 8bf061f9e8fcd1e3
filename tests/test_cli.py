"""The `compressx` command: what it prints, its JSON, its exit codes and its one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx
from compressx import cli, compaction, doctor, formats
from compressx.formats import container
from experiments.common import models

RULES = [("a/kernel", cx.unstructured(keep=12)), ("b/kernel", cx.filters(0.5) & cx.columns(0.5))]

DIGITS = ("--model", "experiments.common.models:DigitsCNN", "--options", '{"classes": 10}')


def _weights() -> dict[str, Any]:
    k = jax.random.split(jax.random.key(0))
    return {
        "a": {"kernel": jax.random.normal(k[0], (10, 12)), "bias": jnp.ones(12)},
        "b": {"kernel": jax.random.normal(k[1], (3, 3, 2, 4))},
    }


@pytest.fixture(scope="module")
def hard() -> dict[str, Any]:
    return cx.harden(_weights(), RULES, fresh=True).params


@pytest.fixture
def file(hard: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "m.safetensors"
    formats.save_model(path, hard, RULES, model={"name": "tiny", "options": {}}, extra={"seed": 1})
    return str(path)


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_inspect_counts_what_is_there(file: str, hard: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "inspect", file, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    layers = {x["path"]: x for x in told["layers"]}
    assert layers.keys() == {"a/kernel", "a/bias", "b/kernel"}
    a = layers["a/kernel"]
    assert (a["kept"], a["weights"], a["rate"], a["shape"]) == (12, 120, 10.0, [10, 12])
    assert a["constraint"] == "unstructured(keep=12, scope=leaf)" and a["bytes_dense"] == 480
    w = np.asarray(hard["a"]["kernel"])
    fit = [f for f in formats.FORMATS.values() if f.supports(w, RULES[0][1]) is True]
    sizes = [formats.nbytes(formats.pack(w, RULES[0][1], (), f.name)) for f in fit]
    assert a["bytes_packed"] == min(sizes)
    assert layers["b/kernel"]["kept"] == 9 * 2 and layers["b/kernel"]["rate"] == 4.0
    assert layers["a/bias"]["constraint"] is None and layers["a/bias"]["bytes_packed"] == 48
    total = told["total"]
    assert total["weights"] == 120 + 72 + 12 and total["kept"] == 12 + 18 + 12
    assert total["rate_constrained"] == (120 + 72) / (12 + 18)
    assert total["bytes_dense"] == 4 * total["weights"]
    assert total["bytes_packed"] == sum(x["bytes_packed"] for x in told["layers"])
    assert total["bytes_file"] == Path(file).stat().st_size
    assert told["model"] == {"name": "tiny", "options": {}} and told["extra"] == {"seed": 1}

    code, out, _ = _run(capsys, "inspect", file)
    assert code == 0 and "model tiny" in out
    (line,) = [x for x in out.splitlines() if x.startswith("a/kernel")]
    fields = line.split()
    assert fields[1:9] == ["10x12", a["format"], "12", "120", "10.00x", "480", str(a["bytes_packed"]), fields[8]]
    assert fields[8] == f"{480 / a['bytes_packed']:.2f}x"


def test_verify_passes_what_was_hardened(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "verify", file)
    assert (code, err) == (0, "") and "2 constraints checked, 0 violated" in out
    assert json.loads(_run(capsys, "verify", file, "--json")[1])["violated"] == 0


def test_verify_names_the_leaf_that_is_outside(
    hard: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = jax.tree.map(np.array, hard)
    wrong["a"]["kernel"].flat[np.flatnonzero(wrong["a"]["kernel"] == 0)[:3]] = 0.01
    path = str(tmp_path / "wrong")
    with pytest.raises(cx.ConstraintViolation, match=r"a/kernel: 3 entries outside unstructured\(keep=12"):
        formats.save_model(path, wrong, RULES)
    formats.save_model(path, wrong, [("a/kernel", cx.unstructured(keep=15)), RULES[1]])
    _, content, arrays, _ = container.read(Path(path), 1 << 20)
    content["rules"][0]["spec"]["keep"] = 12  # what another program may claim
    container.write(Path(path), content, arrays)
    code, out, _ = _run(capsys, "verify", path)
    assert code == 1
    assert "VIOLATED a/kernel: unstructured(keep=12, scope=leaf): 3 entries outside" in out
    assert "ok       b/kernel" in out and "2 constraints checked, 1 violated" in out
    told = json.loads(_run(capsys, "verify", path, "--json")[1])
    assert [x["violations"] for x in told["constraints"]] == [3, 0]


def test_verify_of_a_file_without_constraints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    formats.save_model(tmp_path / "m", _weights())
    code, out, _ = _run(capsys, "verify", str(tmp_path / "m"))
    assert code == 0 and "0 constraints checked" in out


def test_verify_works_with_structures_and_joint_constraints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = _weights()
    rules = [("[ab]/kernel", cx.unstructured(0.1, scope="rule"))]
    formats.save_model(tmp_path / "joint", cx.harden(weights, rules, fresh=True).params, rules)
    assert _run(capsys, "verify", str(tmp_path / "joint"))[0] == 0
    rules = [("b/kernel", cx.constraints.from_spec({"kind": "pattern", "k": 4}))]
    structures = cx.structures(weights, rules)
    formats.save_model(tmp_path / "pattern", cx.harden(weights, rules, fresh=True).params, rules, structures)
    assert _run(capsys, "verify", str(tmp_path / "pattern"))[0] == 0


def test_verify_checks_the_rules_of_another_file(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = str(tmp_path / "rules.json")
    cx.write_rules(rules, [(".*/bias", None), ("a/.*", cx.unstructured(keep=20)), ("b/.*", cx.filters(0.5))])
    code, out, _ = _run(capsys, "verify", file, "--rules", rules)
    assert code == 0 and "ok       a/kernel: unstructured(keep=20" in out and "2 constraints checked, 0 viol" in out
    cx.write_rules(rules, [("a/kernel", cx.unstructured(keep=5))])
    code, out, _ = _run(capsys, "verify", file, "--rules", rules, "--json")
    told = json.loads(out)
    assert code == 1 and told["rules"] == rules and told["violated"] == 1
    assert [x["violations"] for x in told["constraints"]] == [7]
    for written, message in (
        (lambda: cx.write_rules(rules, [("c/.*", cx.filters(0.5))]), "rules.json: rule 0: 'c/.*' matches nothing"),
        (lambda: cx.write_rules(rules, [("a/.*", cx.filters(0.5))]), "a/bias (12,): filters(density=0.5) does not fit"),
        (lambda: Path(rules).write_text("{}"), "rules.json: file: has no 'version'"),
        (lambda: Path(rules).unlink(), "rules.json: No such file or directory"),
    ):
        written()
        code, out, err = _run(capsys, "verify", file, "--rules", rules)
        assert (code, out) == (2, "") and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize(
    "constraint",
    [
        cx.pattern(k=4, shrink=(12, 4)),
        cx.polarize(fragment=4),
        cx.quantize(4),
        cx.filters(0.5) & cx.polarize(fragment=4) & cx.quantize(4),
    ],
    ids=str,
)
def test_verify_under_a_run_s_own_rules_takes_the_structure_that_training_chose(
    constraint: cx.Constraint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = [("w", constraint)]
    w = jax.random.normal(jax.random.key(0), (3, 3, 8, 8))
    tx = cx.admm(rules, rho=1.0, every=1)
    state = tx.init({"w": w})
    moved = {"w": w + 0.5 * jax.random.normal(jax.random.key(1), w.shape)}
    _, state = tx.update(moved, state, moved)
    formats.save_model(tmp_path / "m", cx.harden(moved, rules, state), rules)
    cx.write_rules(tmp_path / "r", rules)
    code, out, _ = _run(capsys, "verify", str(tmp_path / "m"), "--rules", str(tmp_path / "r"))
    assert code == 0 and "1 constraints checked, 0 violated" in out


def test_rules_that_would_take_too_much_are_refused(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cx.write_rules(tmp_path / "r", [("b/kernel", cx.darb(0.25))])
    command = ("verify", file, "--rules", str(tmp_path / "r"), "--max-bytes", "4000")
    code, out, err = _run(capsys, *command)
    assert (code, out) == (2, "") and "b/kernel" in err and "4000" in err


def test_diff_of_a_file_with_itself(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "diff", file, file)
    assert (code, out) == (0, "the same: 3 leaves, bit for bit\n")


def test_diff_says_what_changed(
    file: str, hard: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = jax.tree.map(np.array, hard)
    kernel = other["a"]["kernel"]
    kept = np.flatnonzero(kernel)
    kernel.flat[kept[0]] = 0
    kernel.flat[kept[1]] += np.float32(0.25)
    other["b"]["kernel"] = other["b"]["kernel"][:, :, :, :3]
    del other["a"]["bias"]
    other["c"] = np.ones(2, np.float32)
    path = str(tmp_path / "other")
    formats.save_model(path, other, [("a/kernel", cx.unstructured(keep=11))], model={"name": "other"})
    code, out, _ = _run(capsys, "diff", file, path, "--json")
    told = json.loads(out)
    assert code == 1 and told["removed"] == ["a/bias"] and told["added"] == ["c"]
    a, b = told["changed"]
    assert a["path"] == "a/kernel" and a["shape"] is None and a["kept"] == [12, 11]
    assert a["mask_overlap"] == 11 / 12
    assert a["constraint"] == ["unstructured(keep=12, scope=leaf)", "unstructured(keep=11, scope=leaf)"]
    gone = abs(float(np.asarray(hard["a"]["kernel"]).flat[kept[0]]))
    assert a["max_abs_diff"] == pytest.approx(max(gone, 0.25), rel=1e-6)
    assert b["path"] == "b/kernel" and b["shape"] == [[3, 3, 2, 4], [3, 3, 2, 3]] and b["max_abs_diff"] is None
    assert told["model"] == [{"name": "tiny", "options": {}}, {"name": "other"}]
    code, out, _ = _run(capsys, "diff", file, path)
    assert code == 1 and "1 leaves removed, 1 added, 2 of 2 changed" in out and "- a/bias 12, only in" in out
    assert f"mask overlap {11 / 12:.4f}" in out


def test_diff_sees_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    formats.save_model(tmp_path / "a", {"w": np.array([0.0, np.nan, 1.0], np.float32)})
    formats.save_model(tmp_path / "b", {"w": np.array([-0.0, np.nan, 1.0], np.float32)})
    code, out, _ = _run(capsys, "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json")
    (changed,) = json.loads(out)["changed"]
    assert code == 1 and changed["mask_overlap"] == 1.0 and changed["max_abs_diff"] is None


def test_errors_are_one_line_and_exit_2(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = bytearray(Path(file).read_bytes())
    raw[-1] ^= 1
    damaged = tmp_path / "damaged"
    damaged.write_bytes(raw)
    (tmp_path / "folder").mkdir()
    for arguments, message in (
        (("inspect", str(tmp_path / "absent")), "absent: No such file or directory"),
        (("verify", str(damaged)), "damaged: sha256: the file is damaged"),
        (("diff", file, str(tmp_path / "folder")), "not a regular file"),
        (("inspect", file, "--max-bytes", "10"), "more than max_bytes=10"),
    ):
        code, out, err = _run(capsys, *arguments)
        assert (
            (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("compressx: error: ") and message in err
        )


@pytest.mark.parametrize(
    "arguments",
    [
        *((), ("melt",), ("inspect",), ("diff", "a"), ("inspect", "a", "--max-bytes", "0"), ("export", "a", "b")),
        ("export", "a", "b", *DIGITS, "--to", "tflite", "--shape", "8"),
        ("export", "a", "b", *DIGITS, "--to", "onnx", "--shape", "8x"),
        ("export", "a", "b", "--to", "onnx", "--shape", "8", *DIGITS[:2], "--options", "[]"),
    ],
)
def test_bad_usage_exits_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and "usage: compressx" in capsys.readouterr().err


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A saved digits CNN with half of its channels pruned, and its variables."""
    module, x = models.build("digits_cnn", classes=10), jnp.zeros((1, 8, 8, 1))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    rules = compaction.coupled_rules(compaction.groups(compaction.channels(module, variables, x)), 0.5, vectors=True)
    hard = cx.harden(variables, rules, fresh=True).params
    path = tmp_path_factory.mktemp("network") / "m.safetensors"
    formats.save_model(path, hard, rules, model={"name": "digits_cnn", "options": {}}, extra={"classes": 10})
    return str(path), lambda images: np.asarray(module.apply(hard, images))



@pytest.mark.parametrize("compact", [False, True])
def test_export_writes_a_network_that_onnxruntime_runs(
    network: Any, compact: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx", reason="needs the extra 'export'")
    ort = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    out = str(tmp_path / "m.onnx")
    flags = ("--compact",) if compact else ()
    given = ("export", network[0], out, "--to", "onnx", "--shape", "8x8x1", "--json", *DIGITS)
    code, text, err = _run(capsys, *given, *flags)
    told = json.loads(text)
    assert (code, err) == (0, "") and told["bytes"] == Path(out).stat().st_size and told["shape"] == [8, 8, 1]
    whole = sum(x.size for x in jax.tree.leaves(formats.load_model(network[0]).params))
    assert told["weights"] < whole / 2 if compact else told["weights"] == whole
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": images})[0], network[1](images), rtol=0, atol=1e-4)


def test_export_writes_stablehlo(network: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flatbuffers", reason="needs the extra 'export'")
    out = tmp_path / "m.hlo"
    given = ("export", network[0], str(out), "--to", "stablehlo", "--shape", "8x8x1", "--compact")
    code, text, _ = _run(capsys, *given, *DIGITS)
    assert code == 0 and "m.hlo: stablehlo, " in text and "inputs [batch, 8, 8, 1]" in text
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    found = jax.export.deserialize(bytearray(out.read_bytes())).call(jnp.asarray(images))
    np.testing.assert_allclose(found, network[1](images), rtol=0, atol=1e-4)


def test_export_says_what_is_wrong(
    network: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx", reason="needs the extra 'export'")
    out = str(tmp_path / "out")
    for to, shape, model, options, message in (
        (out, "8x8x1", "tiny", "{}", "must be package.module:Class"),
        (out, "8x8x1", "no.such.module:Net", "{}", "cannot be imported"),
        (out, "8x8x1", "experiments.common.models:Tiny", "{}", "has no Tiny"),
        (out, "8x8x1", DIGITS[1], '{"wings": 2}', "wings"),
        (out, "9x9x2", DIGITS[1], DIGITS[3], "cannot be exported for inputs of 9x9x2"),
        (str(tmp_path / "no" / "out"), "8x8x1", DIGITS[1], DIGITS[3], "No such file or directory"),
    ):
        given = ("--to", "onnx", "--shape", shape, "--model", model, "--options", options)
        code, text, err = _run(capsys, "export", network[0], to, *given)
        assert (code, text) == (2, "") and err.count("\n") == 1 and message in err
    assert not Path(out).exists()


def test_text_from_a_file_cannot_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "m")
    formats.save_model(path, {"w": np.ones(2)}, model={"name": "x\x1b[2J\ud800"})
    code, out, _ = _run(capsys, "inspect", path)
    assert code == 0 and "model x?[2J?" in out and "\x1b" not in out


def test_doctor_finds_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "doctor", "--json")
    told = json.loads(out)
    checks = {c["name"]: c for c in told["checks"]}
    assert code == 0 and told["missing"] == 0
    assert checks["jax"]["found"] == jax.__version__
    assert checks["devices"]["found"].startswith(f"{jax.device_count()} x {jax.devices()[0].platform}")
    assert all(c["fix"] for c in checks.values() if not c["ok"])
    assert "everything needed is here" in _run(capsys, "doctor")[1]


def test_doctor_says_how_to_get_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPRESSX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", None)
    monkeypatch.setitem(doctor.PACKAGES, "No_Such.one", "export")
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["no-such-package>=2,<3", "No_Such.one>=1; x"])
    code, out, _ = _run(capsys, "doctor", "--json")
    told = json.loads(out)
    checks = {c["name"]: c for c in told["checks"]}
    assert code == 1 and told["missing"] == 1
    assert checks["no-such-package"]["fix"] == "pip install 'no-such-package>=2,<3'"
    assert checks["No_Such.one"]["fix"] == "pip install 'No_Such.one>=1'" and "export" in checks["No_Such.one"]["found"]
    assert not checks["C++ compiler"]["ok"] and "no-such-compiler" in checks["C++ compiler"]["found"]
    assert str(tmp_path / "cache") in checks["cache folder"]["found"]
    assert not (tmp_path / "cache").exists()


def test_the_module_runs_as_a_command(file: str) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "compressx", "verify", file]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0 and "0 violated" in run.stdout and run.stderr == ""
