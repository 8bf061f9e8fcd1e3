"""From file to file: any safetensors weights, projected and packed as one would by hand, and resumed after a kill."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import compressx as cx
from compressx import cli, formats
from compressx.formats import CompressedFileError, one_shot
from compressx.formats.base import DTYPES, same

RULES = [
    (r"layers\.[01]\.q\.weight", cx.n_of_m(2, 4), "out in"),
    (r"layers\..*\.k\.weight", cx.unstructured(0.1, scope="rule")),
    (r"head/.*", cx.quantize(4)),
]


def _weights() -> dict[str, np.ndarray]:
    r = np.random.default_rng(0)
    names = [f"layers.{i}.{k}.weight" for i in range(2) for k in "qk"]
    out = {name: r.standard_normal((24, 16)).astype(DTYPES["bfloat16"]) for name in names}
    return out | {"head/kernel": r.standard_normal((16, 8)).astype(np.float32), "steps": np.arange(3)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with two shards and their index, as Hugging Face has them."""
    folder, w = tmp_path / "source", _weights()
    folder.mkdir()
    placed = {}
    for i, half in enumerate((sorted(w)[:3], sorted(w)[3:])):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        safetensors.numpy.save_file({k: w[k] for k in half}, folder / name, {"format": "pt"})
        placed |= dict.fromkeys(half, name)
    index = {"metadata": {"total_size": sum(x.nbytes for x in w.values())}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_file_is_what_hardening_and_saving_give(source: Path, tmp_path: Path) -> None:
    done = one_shot.compress(source, tmp_path / "out", RULES)
    w = _weights()
    w["head"] = {"kernel": w.pop("head/kernel")}  # type: ignore[assignment]
    hard = cx.harden(w, RULES, fresh=True)
    by_hand = cx.save_model(tmp_path / "hand", hard, RULES)
    a, b = cx.load_model(tmp_path / "out"), cx.load_model(tmp_path / "hand")
    assert {p: x.format for p, x in a.packed.items()} == {p: x.format for p, x in b.packed.items()}
    with formats.open_model(tmp_path / "out") as x, formats.open_model(tmp_path / "hand") as y:
        assert list(x) == list(y) and all(same(x[p], y[p]) for p in y)
    told = [sorted((r[0], json.dumps(r[1].spec), *r[2:]) for r in x.rules) for x in (a, b)]
    assert told[0] == told[1]
    assert (done.sizes.dense, done.sizes.packed) == (by_hand.dense, by_hand.packed)
    assert done.sizes.file == (tmp_path / "out").stat().st_size and done.resumed == 0
    assert (done.weights, done.constrained) == (4 * 384 + 128 + 3, 4 * 384 + 128)
    assert done.kept_constrained == 2 * 192 + 77 + 128 and done.kept == done.kept_constrained + 2
    assert not (tmp_path / "out.partial").exists()
    cx.check(a, a.rules)


def test_a_packed_file_is_a_source_too(source: Path, tmp_path: Path) -> None:
    one_shot.compress(source, tmp_path / "out", RULES[:1])
    again = one_shot.compress(tmp_path / "out", tmp_path / "again", RULES, coding="zlib", shard_bytes=1000)
    assert again.kept_constrained == 2 * 192 + 77 + 128
    assert cx.load_model(tmp_path / "again").sizes == again.sizes
    assert (tmp_path / "again.index.json").exists()


class _Interrupted(Exception):
    pass


def _interrupt(after: int) -> Any:
    steps = iter(range(after))

    def progress(done: int, total: int) -> None:
        if next(steps, None) is None:
            raise _Interrupted

    return progress


def test_a_run_is_resumed_where_leaves_and_rules_are_the_same(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(_Interrupted):
        one_shot.compress(source, out, RULES, progress=_interrupt(2))
    assert len(list((tmp_path / "out.partial").iterdir())) == 3 and not out.exists()
    damaged = tmp_path / "out.partial" / "00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = one_shot.compress(source, out, RULES)
    assert done.resumed == 2
    one_shot.compress(source, tmp_path / "whole", RULES)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_parts_of_other_rules_or_weights_are_made_anew(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(_Interrupted):
        one_shot.compress(source, out, RULES, progress=_interrupt(4))
    other = [(RULES[0][0], cx.n_of_m(1, 4), "out in"), *RULES[1:]]
    shard = source / "model-00001-of-00002.safetensors"
    held = safetensors.numpy.load_file(shard)
    held["head/kernel"][0, 0] += 1
    safetensors.numpy.save_file(held, shard)
    assert one_shot.compress(source, out, other).resumed == 2  # the joint rule, and the leaf without one
    one_shot.compress(source, tmp_path / "whole", other)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


_KILLED = """
import sys, os, signal
from compressx.formats import one_shot
from compressx import read_rules
count = iter(range(2))
def progress(done, total):
    if next(count, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
one_shot.compress(sys.argv[1], sys.argv[2], read_rules(sys.argv[3]).rules, progress=progress)
"""


def test_a_killed_run_is_resumed(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, rules = str(tmp_path / "out"), str(tmp_path / "rules.json")
    cx.write_rules(rules, RULES)
    done = subprocess.run([sys.executable, "-c", _KILLED, str(source), out, rules])
    assert done.returncode == -9 and not Path(out).exists()
    assert cli.main(["compress", str(source), out, "--rules", rules, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["resumed"] == 3 and printed["kept_constrained"] == 2 * 192 + 77 + 128
    assert printed["bytes_file"] == Path(out).stat().st_size < printed["bytes_dense"] + 8000
    assert cli.main(["verify", out]) == 0


def test_the_command_says_what_it_kept_and_what_is_wrong(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rules = str(tmp_path / "out"), str(tmp_path / "rules.json")
    cx.write_rules(rules, RULES[2:])
    assert cli.main(["compress", str(source), out, "--rules", rules]) == 0
    assert "kept 128 of 128 constrained weights, 1666 of all 1667" in capsys.readouterr().out
    cx.write_rules(rules, [("nothing", cx.filters(0.5))])
    assert cli.main(["compress", str(source), out, "--rules", rules]) == 2
    assert "'nothing' matches nothing" in capsys.readouterr().err
    (source / "model-00002-of-00002.safetensors").unlink()
    assert cli.main(["compress", str(source), out, "--rules", rules]) == 2
    assert "model-00002-of-00002.safetensors: this shard is missing" in capsys.readouterr().err


def test_a_leaf_that_is_not_finite_is_named(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.array([[np.nan, 1]], np.float32)}, tmp_path / "in")
    with pytest.raises(ValueError, match=r"w \(1, 2\): 1 weight values are NaN or infinite"):
        one_shot.compress(tmp_path / "in", tmp_path / "out", [("w", cx.unstructured(0.5))])
    (tmp_path / "in2").write_bytes(b"abc")
    with pytest.raises(CompressedFileError, match="in2: file: 3 bytes are too few"):
        one_shot.compress(tmp_path / "in2", tmp_path / "out", [("w", cx.unstructured(0.5))])
