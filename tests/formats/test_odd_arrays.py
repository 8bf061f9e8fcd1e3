"""What a file makes of arrays of any kind, and of the same input twice: native values, and the same bytes."""

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
import safetensors.numpy

import compressx as cx
from compressx.formats import FORMATS, container, load_model, save_model
from compressx.formats.base import same


@pytest.mark.parametrize("order", [">", "<", "="])
@pytest.mark.parametrize("kind", ["f8", "f4", "f2", "i8", "i4", "i2", "u8", "u4", "u2"])
def test_leaves_of_any_byte_order_are_saved_as_native_ones(kind: str, order: str, tmp_path: Path) -> None:
    native = np.array([[0, 1, 0], [0, 2, 100]], kind)
    foreign = native.astype(native.dtype.newbyteorder(order))
    for format in ("dense", "compact", "bitmask", "csr", "coo-delta", "bspc", "block-max"):
        save_model(tmp_path / "a", {"w": foreign}, layout=[("w", format)])
        save_model(tmp_path / "b", {"w": native}, layout=[("w", format)])
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert same(load_model(tmp_path / "a").params["w"], native)


def test_rules_and_structures_of_a_foreign_byte_order_are_saved_as_native_ones(tmp_path: Path) -> None:
    rules = [("w", cx.unstructured(0.5) & cx.quantize(4))]
    hard = np.asarray(cx.harden({"w": jax.random.normal(jax.random.key(0), (8, 8))}, rules, fresh=True).params["w"])
    structures = jax.device_get(cx.structures({"w": hard}, rules))
    foreign = jax.tree.map(lambda x: np.asarray(x).astype(x.dtype.newbyteorder(">")), structures)
    save_model(tmp_path / "a", {"w": hard.astype(">f4")}, rules, foreign)
    save_model(tmp_path / "b", {"w": hard}, rules, structures)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    save_model(tmp_path / "a", {"w": hard.astype(">f4")}, rules)
    assert same(load_model(tmp_path / "a").params["w"], hard)


LEAVES: dict[str, Any] = {
    "strided": np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::-3],
    "transposed": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "broadcast": np.broadcast_to(np.float16(3), (3, 4)),
    "unaligned": np.frombuffer(b"x" + np.arange(4, dtype=np.float64).tobytes(), np.uint8)[1:].view(np.float64),
    "read-only": np.frombuffer(np.arange(4, dtype=np.int64).tobytes(), np.int64),
    "scalar array": np.array(2.5, np.float32),
    "NumPy scalar": np.float64(0.1),
    "NumPy bool": np.bool_(True),
    "float": 0.1,
    "int": -3,
    "bool": True,
    "jax": jnp.bfloat16(1.5),
    "foreign scalar": np.array(7, ">i4"),
    "empty foreign": np.zeros((0, 3), ">f8"),
}


@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize("coding", container.CODINGS)
def test_odd_leaves_come_back_in_shape_dtype_and_value(kind: str, coding: str, tmp_path: Path) -> None:
    leaf = LEAVES[kind]
    save_model(tmp_path / "m", {"a": leaf, "b": np.ones(2)}, coding=coding)
    got, right = load_model(tmp_path / "m").params["a"], np.asarray(leaf)
    assert got.shape == right.shape and got.dtype == right.dtype.newbyteorder("=") and got.dtype.isnative
    assert np.array_equal(got, right)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("text", "layer/w: .*dtype str"),
        (np.ones(2, complex), "layer/w: .*dtype complex128"),
        (np.ones(2, object), "layer/w: .*dtype object"),
        (np.ones(2, "M8[s]"), "layer/w: .*dtype datetime64"),
        (np.ones(2, np.longdouble), "layer/w: .*dtype (float128|longdouble)"),
        (np.zeros(2, [("a", "f4")]), "layer/w: .*dtype void"),
        (np.ma.masked_array(np.ones(2), [True, False]), "layer/w: a masked array"),
        (jax.random.key(0), "layer/w: "),
        (np.array([1], np.dtype(jnp.bfloat16).newbyteorder(">")), "layer/w: dtype bfloat16 in a foreign byte order"),
    ],
    ids=lambda x: type(x).__name__ + str(getattr(x, "dtype", "")),
)
def test_leaves_that_no_file_holds_are_refused_by_name(leaf: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_model(tmp_path / "m", {"layer": {"w": leaf}, "other": np.ones(2)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (0, 0), (2, 0, 3), (3, 3, 0, 8), (3, 3, 8, 0)])
def test_empty_leaves_come_back_from_every_format_that_takes_them(shape: tuple[int, ...], tmp_path: Path) -> None:
    w = np.zeros(shape, np.float32)
    took = []
    for format in FORMATS:
        if FORMATS[format].supports(w, None) is not True:
            with pytest.raises(ValueError, match="^layer: "):
                save_model(tmp_path / "m", {"layer": w}, layout=[("layer", format)])
            continue
        took.append(format)
        save_model(tmp_path / "m", {"layer": w}, layout=[("layer", format)])
        assert same(load_model(tmp_path / "m").params["layer"], w)
    assert set(took) >= {"dense", "bitmask", "coo-delta"} | ({"compact", "csr", "csr16"} if len(shape) > 1 else set())


_WRITE = """
import sys, jax, jax.numpy as jnp, numpy as np, compressx as cx
k = jax.random.split(jax.random.key(0), 3)
conv = {"kernel": jax.random.normal(k[0], (3, 3, 4, 8)), "bias": np.arange(8.0)}
params = {"conv": conv, "b": [jnp.ones(2, jnp.bfloat16), 3]}
params |= {name: jax.random.normal(k[1], (16, 8)) for name in {"x", "y", "zeta", "omega"}}
rules = [("conv/kernel", cx.pattern_connectivity(0.4, k=4) & cx.quantize(4))]
rules += [("x|y|zeta", cx.unstructured(0.3, scope="rule"))]
hard = cx.harden(params, rules, fresh=True)
about = {"options": {"b": 1, "a": [1, 2]}, "name": "net"}
cx.save_model(sys.argv[1], hard, rules, model=about, extra={"seed": 0, "ok": True, "é": 1e-9}, coding=sys.argv[2])
"""


def test_the_same_input_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    for coding in container.CODINGS:
        files = [tmp_path / f"{coding}{seed}" for seed in (0, 1)]
        for seed, file in enumerate(files):
            env = {**os.environ, "PYTHONHASHSEED": str(seed), "JAX_PLATFORMS": "cpu"}
            subprocess.run([sys.executable, "-c", _WRITE, str(file), coding], env=env, check=True, timeout=600)
        assert len({file.read_bytes() for file in files}) == 1


def test_a_model_that_is_read_and_saved_again_is_the_same_file(tmp_path: Path) -> None:
    params = {"b": jax.random.normal(jax.random.key(0), (3, 3, 4, 6)), "a": np.ones(3)}
    rules = [("b", cx.pattern_connectivity(0.4, k=4) & cx.quantize(4))]
    hard = cx.harden(params, rules, fresh=True).params
    structures = cx.structures(hard, rules)
    for i in range(8):
        save_model(tmp_path / f"{i}", hard, rules, structures, model={"name": "small", "options": {}}, extra=[1])
    back = load_model(tmp_path / "0")
    save_model(tmp_path / "again", back.params, back.rules, back.structures, model=back.model, extra=back.extra)
    assert len({p.read_bytes() for p in tmp_path.iterdir()}) == 1


def test_the_file_is_safetensors_own_with_metadata_in_order(tmp_path: Path) -> None:
    arrays = {"é": np.ones(3), "b": np.ones((2, 2), np.uint8), "a": np.zeros((0, 2), jnp.bfloat16), "c": np.float32(1)}
    arrays = {k: np.asarray(a) for k, a in arrays.items()}
    for held in (arrays, {}):
        container.write(tmp_path / "f", {"x": '"\\'}, held)
        data = (tmp_path / "f").read_bytes()
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        assert list(metadata) == ["compressx", "sha256"]
        own = set()
        for _ in range(60):  # safetensors writes the two entries of the metadata in either order
            own.add(safetensors.numpy.save(held, metadata))
        assert data in own


def test_a_random_key_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="a random key, which is no weight; leave it out"):
        cx.formats.pack(jax.random.key(0))
