"""What the golden figures are: their inputs, the same wherever they are drawn, and what the library makes of them.

A figure is a tree of JSON. Its leaves are compared for equality; where one is `{"value": ..., "within": t}`, every
number may differ by t.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import adapter, cases

FOLDER = Path(__file__).resolve().parent / "figures"
Figure = dict[str, Any]


def draw(name: str, shape: Sequence[int]) -> np.ndarray:
    """Float64 numbers of mean 0 and variance 1, bell-shaped, the same for a name in every release of NumPy.

    The raw stream of a bit generator never changes; those of `Generator.standard_normal` and of jax.random may.
    """
    n = math.prod(shape)
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(4 * n).reshape(4, n)
    u = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return ((u[0] + u[1] + u[2] + u[3] - 2) * math.sqrt(3)).reshape(tuple(shape))


def uniform(name: str, shape: Sequence[int]) -> np.ndarray:
    """Float64 numbers in [0, 1), likewise."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(tuple(shape))


def even(x: np.ndarray) -> np.ndarray:
    """Multiples of 1/8: many ties and some zeros, and sums and products that no order of operations rounds."""
    return np.round(x * 8) / 8


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    """An array of a dtype that NumPy knows or that jax adds to it."""
    return np.asarray(x).astype(jnp.dtype(dtype))


# --- figures


def bits(tree: Any) -> Figure:
    """What a tree of arrays is, to the bit, and three numbers by which a person sees what changed."""
    digest, about, nonzeros, total = hashlib.sha256(), [], 0, 0.0
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        kind = f"{leaf.dtype.name}{list(leaf.shape)}"
        digest.update(kind.encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
        about.append(kind)
        nonzeros += int(np.count_nonzero(leaf))
        total += math.fsum(np.abs(leaf.astype(np.float64)).ravel().tolist())
    return {"leaves": " ".join(about), "nonzeros": nonzeros, "sum": total, "sha256": digest.hexdigest()}


def near(x: Any, within: float) -> Figure:
    """An array of floats to a tolerance."""
    digits = np.vectorize(lambda v: float(f"{v:.9g}"), otypes=[float])  # as many as a float32 has
    return {"value": digits(np.asarray(x, np.float64)).tolist(), "within": float(f"{within:.3g}")}


def set_figure(name: str) -> Figure:
    """Structure, projection, piece and retraction of a moved point, for two arrays."""
    case = cases.SETS[name]
    s = adapter.set_of(case.spec)

    def steps(w: Any, step: Any) -> Figure:
        structure = s.init(w)
        z = s.project(w, structure)
        piece = s.freeze(z, structure)
        moved = jax.tree.map(lambda a, b: a + b, z, step)
        return {"structure": structure, "project": z, "freeze": piece, "retract": s.retract(moved, piece)}

    run = jax.jit(steps)
    figure = {}
    for kind in case.arrays:
        drawn = [[draw(f"sets/{name}/{part}/{i}", x) for i, x in enumerate(case.shapes)] for part in ("w", "step")]
        w, step = ([cast(even(x) if kind == "even" else x, case.dtype) for x in part] for part in drawn)
        w, step = (tuple(part) if s.joint else part[0] for part in (w, step))
        step = jax.tree.map(lambda x: (x / 4).astype(x.dtype), step)
        made = run(w, step)
        figure[kind] = {part: bits(made[part]) for part in ("structure", "project", "freeze", "retract")}
    return figure


def stored_file(name: str) -> Path:
    """Where the saved model of a case lies."""
    return FOLDER / "files" / f"{name.replace(' ', '_')}.safetensors"


def save_file(name: str, path: Path) -> None:
    """Makes the saved model of a case from its case alone."""
    case = cases.FILES[name]
    if case.model is None:
        params: Any = {}
        for key, (shape, dtype, share) in case.leaves.items():
            w = np.where(uniform(f"files/{key}/zeros", shape) < share, draw(f"files/{key}", shape), 0)
            *folders, leaf = key.split("/")
            node = params
            for part in folders:
                node = node.setdefault(part, {})
            node[leaf] = cast(np.round(w * 4) if "int" in dtype else w, dtype)
    else:
        about = dict(case.model["options"])
        model = adapter.network(case.model["name"], about.pop("classes"), about)
        params = variables_of(f"files/{name}", model, (1, *case.image))
    adapter.save(path, params, case.rules, case.layout, case.coding, case.model)


def content(data: bytes) -> Figure:
    """All that a file says, whatever the order of its keys and arrays: header, checksum, and every array to the bit."""
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    metadata = entries.pop("__metadata__")
    arrays = {}
    for name, entry in entries.items():
        first, end = entry.pop("data_offsets")
        arrays[name] = {**entry, "sha256": hashlib.sha256(data[start + first : start + end]).hexdigest()}
    return {"header": json.loads(metadata.pop("compressx")), "checksum": metadata, "arrays": arrays}


def file_figure(name: str) -> Figure:
    """What is read from the stored file, how much of it lies outside its sets, and whether it is written as it was."""
    case, path = cases.FILES[name], stored_file(name)
    loaded = adapter.load(path)
    leaves = {p: {"format": loaded.formats[p], **bits(w)} for p, w in loaded.leaves.items()}
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "m.safetensors"
        adapter.save_again(again, loaded, case.layout, case.coding)
        old, new = content(path.read_bytes()), content(again.read_bytes())
    # a later version of the format is another file
    other = [part for part in old if old["header"]["version"] == new["header"]["version"] and old[part] != new[part]]
    return {
        "leaves": leaves,
        "structures": bits(loaded.structures),
        "packed_bytes": loaded.packed_bytes,
        "violations": adapter.violations(loaded),
        "written otherwise": other,
    }


def variables_of(name: str, model: Any, shape: Sequence[int], cut: str = "") -> Any:
    """Variables of a network that keep its values near 1, drawn leaf by leaf, zeros as `cases.Network.cut` says."""
    paths, shapes, treedef = adapter.shapes_of(model, shape)
    leaves = []
    for path, s in zip(paths, shapes, strict=True):
        key, last = f"{name}/{path}", path.split("/")[-1]
        if last in ("scale", "var"):
            w = 0.75 + 0.5 * uniform(key, s)
        elif len(s) > 1:
            w = draw(key, s) * math.sqrt(2 / math.prod(s[:-1]))
        else:
            w = 0.1 * draw(key, s)
        if cut and len(s) == 4 and s[2] > 3:
            w = w * (uniform(f"{key}/cut", (1, 1, s[2], s[3]) if cut == "kernels" else (s[3],)) < 0.5)
        leaves.append(w.astype(np.float32))
    return jax.tree.unflatten(treedef, leaves)


def matrix(name: str, inputs: int, outputs: int, format: str) -> np.ndarray:
    """A matrix with zeros where a format has use for them."""
    u, w = uniform(f"{name}/zeros", (inputs, outputs)), 0.4 * draw(name, (inputs, outputs))
    if format == "bspc":  # strips of outputs, each with inputs and outputs of its own
        strip = np.arange(outputs) // 20
        keep = (u[:, strip] < 0.4) & (u[0] < 0.8)
    elif format == "block-max":  # one weight in every four outputs
        keep = np.arange(outputs) % 4 == (4 * u[:, np.arange(outputs) // 4]).astype(int)
    else:
        keep = u < 0.15
    return np.where(keep, w, 0).astype(np.float32)


def network_figure(name: str) -> Figure:
    """The outputs of a compiled network or prepared cell for one input."""
    case = cases.NETWORKS[name]
    figure: Figure = {}
    if isinstance(case, cases.Cell):
        gates = {"product": 1, "lstm": 4}.get(case.cell, 3)
        mats = [matrix(f"networks/{name}/{k}", case.units, case.units, case.format) for k in range(gates)]
        inputs = {"x": (6, 3, gates * case.units), "h": (3, case.units), "c": (3, case.units), "bias": (case.units,)}
        x = {k: draw(f"networks/{name}/{k}", s).astype(np.float32) for k, s in inputs.items()}
        if case.cell == "product":
            out = adapter.product(mats[0], case.format)(x["x"][0])
        else:
            out = adapter.recurrent(case.cell, mats, case.format)(*x.values())
    elif isinstance(case, str):
        image = draw(f"networks/{name}", (2, *cases.FILES[case].image)).astype(np.float32)
        out = adapter.compiled(adapter.load(stored_file(case)).saved)(image)
    else:
        model = adapter.network(case.name, case.classes, case.options)
        variables = variables_of(f"networks/{name}", model, case.shape, case.cut)
        x = draw(f"networks/{name}", case.shape).astype(np.float32)
        if case.cut == "compact":
            model, variables = adapter.compacted(model, variables, x)
            figure["weights"] = sum(w.size for w in jax.tree.leaves(variables))
        out = adapter.compiled(model, variables)(x)
    for number, y in enumerate(map(np.asarray, jax.tree.leaves(out))):
        figure[f"output {number}"] = near(y, 1e-5 * max(1.0, float(np.abs(y).max())))
    return figure


def driver_figure(name: str) -> Figure:
    """Metrics, losses, rates and bytes of a tiny run, by dotted key of its summary."""
    case = cases.DRIVERS[name]
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            summary = adapter.run(case.driver, case.variant, case.changes, Path(folder) / "run")
    figure: Figure = {}
    for key, within in case.within.items():
        value: Any = summary
        for part in key.split("."):
            value = value[part]
        figure[key] = value if within is None or value is None else {"value": value, "within": within}
    return figure
