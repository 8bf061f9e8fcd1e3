"""compressx as the cases call it: the only file beside them that names its API, so that a rename is made here alone.

The cases hold inputs, right values and assertions. How weights are hardened, retrained, saved, loaded, verified,
compiled, compacted and exported, how sets are spelled, how a file of today's version is forged, and what is run in a
process of its own, stands here.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

import compressx
from compressx import (
    ConstraintViolation,
    admm,
    bank_balanced,
    block,
    bsp,
    channels,
    cli,
    columns,
    compaction,
    darb,
    export,
    filters,
    formats,
    kernels,
    n_of_m,
    pattern,
    polarize,
    prune_blocks,
    quantize,
    retrain,
    top_k_mask,
    unify,
)
from compressx.cache import cache_folder
from compressx.compaction import CompactionError
from compressx.formats import container
from compressx.native import build

# Named as the cases name them; where one is renamed, a function here keeps the old spelling.
__all__ = [
    "CompactionError",
    "ConstraintViolation",
    "admm",
    "bank_balanced",
    "block",
    "bsp",
    "channels",
    "columns",
    "darb",
    "filters",
    "n_of_m",
    "pattern",
    "polarize",
    "prune_blocks",
    "quantize",
    "retrain",
    "top_k_mask",
    "unify",
]

_MAX_BYTES = 1 << 32
_ADDRESS_SPACE = 16 << 30  # of a process that opens a hostile file


# Sets


def unstructured(density: float | None = None, *, keep: int | None = None, joint: bool = False) -> Any:
    """The largest weights of each leaf, or with `joint` of all leaves of the rule together."""
    return compressx.unstructured(density, keep=keep, scope="rule" if joint else "leaf")


def kind(constraint: Any) -> str:
    """The name of a constraint's set."""
    return str(constraint.spec["kind"])


def project(constraint: Any, w: Any) -> Any:
    """The nearest point of a set that has no structure."""
    return constraint.project(w, ())


def retract_to_frozen(constraint: Any, w: Any) -> Any:
    """A point of a set that has no structure, brought back to its active set."""
    return constraint.retract(w, constraint.freeze(w, ()))


# From training to hardened weights


def dual(state: Any, name: str) -> Any:
    """ADMM's scaled dual variable U of a leaf that lies in one set, or in the first of its sets."""
    return state.u[0][name]


def rho(state: Any) -> Mapping[str, Any]:
    """The penalty of each constrained leaf, by name."""
    return state.rho


def find_admm_state(opt_state: Any) -> Any:
    """The ADMM state in any optimizer state."""
    return compressx.find_admm_state(opt_state)


def harden(params: Any, rules: Any, state: Any = None) -> Any:
    """The weights, projected onto their sets; with an ADMM state, with the structures that it holds."""
    return compressx.harden(params, rules, state, fresh=state is None).params


def structures(params: Any, rules: Any) -> Any:
    """The structure of the sets, chosen for these weights."""
    return compressx.structures(params, rules)


def check(params: Any, rules: Any, chosen: Any) -> None:
    """Raises `ConstraintViolation` where weights lie outside their sets."""
    compressx.check(params, rules, chosen)


def retract(params: Any, rules: Any, opt_state: Any) -> Any:
    """The weights, brought back exactly into the pieces of the retraining whose optimizer state this is."""
    return compressx.retract(params, rules, opt_state).params


# Files


def save(path: Path, params: Any, rules: Any = (), chosen: Any = None, *, model: Any = None) -> None:
    """Writes a saved model."""
    formats.save_model(path, params, rules, chosen, model=model)


def load(path: Path) -> Any:
    """The parameters of a saved model, as loading gives them back."""
    return formats.load_model(path).params


def verify(path: Path) -> bool:
    """True where `compressx verify` finds that every constraint of the file holds."""
    return cli.main(["verify", str(path)]) == 0


# Forged files


class Stored(NamedTuple):
    """An array of a forged file: what the header says of it, and the array or its coded bytes as they are stored."""

    dtype: str
    shape: tuple[int, ...]
    coding: str
    data: np.ndarray


def stored_plainly(array: np.ndarray) -> Stored:
    """An array stored as it is."""
    return Stored(array.dtype.name, array.shape, "none", array)


def forge(path: Path, leaves: Sequence[Any], arrays: Mapping[str, Stored], rules: Sequence[Any] = ()) -> Path:
    """Writes a file of today's version, with today's digest, whose content may be anything; returns its path.

    Args:
      path: the file.
      leaves: as `forged_leaf` describes them.
      arrays: by their names in the file.
      rules: as `forged_rule` describes them.
    """
    header = container.to_json(
        {
            "version": container.VERSION,
            "arrays": {n: {"dtype": a.dtype, "shape": list(a.shape), "coding": a.coding} for n, a in arrays.items()},
            "content": {"model": None, "extra": None, "leaves": list(leaves), "rules": list(rules)},
        }
    )
    held = {name: a.data for name, a in arrays.items()}
    digest = container._digest(header, held)
    path.write_bytes(safetensors.numpy.save(held, {"compressx": header, "sha256": digest}))
    return path


def forged_leaf(
    path: str, shape: Sequence[int], dtype: str, format: str, meta: Mapping[str, Any], arrays: Mapping[str, str]
) -> Any:
    """How a file describes a packed leaf; `arrays` maps the format's names to those in the file."""
    return {
        "path": path.split("/"),
        "shape": list(shape),
        "dtype": dtype,
        "format": {"name": format, "version": 1},
        "meta": dict(meta),
        "arrays": dict(arrays),
    }


def forged_rule(paths: Sequence[str], spec: Any) -> Any:
    """How a file describes a rule whose set has no structure."""
    return {"paths": [path.split("/") for path in paths], "axes": None, "spec": spec, "structure": []}


def spec_of_unstructured(density: float) -> Any:
    """The description of `unstructured` in a file."""
    return {"kind": "unstructured", "density": density, "keep": None, "scope": "leaf"}


def spec_of_coupled_filters(members: Sequence[Any], density: float) -> Any:
    """The description of `coupled_filters` in a file."""
    return {
        "kind": "coupled_filters",
        "members": list(members),
        "density": density,
        "keep": None,
        "column_density": None,
    }


def spec_of_intersection(parts: Sequence[Any]) -> Any:
    """The description of an intersection of sets in a file."""
    return {"kind": "all", "parts": list(parts)}


_OPEN = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
from compressx import formats
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
idle = peak()
start = time.perf_counter()
try:
    formats.load_model({path!r}, max_bytes={max_bytes})
except formats.CompressedFileError:
    pass
print(time.perf_counter() - start, peak() - idle)
"""


def cost_of_opening(path: Path, max_bytes: int = _MAX_BYTES) -> tuple[float, float]:
    """Seconds, and bytes beyond an idle import, that opening a file takes in a process of its own.

    The peak is that of the address space (VmHWM): `ru_maxrss` would begin at the size of the process that starts this
    one. A file that is refused as a `CompressedFileError` is as good as one that opens.
    """
    code = _OPEN.format(limit=_ADDRESS_SPACE, path=str(path), max_bytes=max_bytes)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, size = map(float, done.stdout.split()[-2:])
    return seconds, size


# Compilation


def native_available() -> bool:
    """True where the native kernels run; they are compiled at the first call."""
    return kernels.available()


def compile(model: Any, variables: Any) -> Any:
    """The network in compressed form, called as `f(x)`."""
    return compressx.compile(model, variables)


def compile_file(path: Path) -> Any:
    """The network of a saved model in compressed form."""
    return compressx.compile(formats.load_model(path), None)


def layer_lines(network: Any, x: Any) -> list[str]:
    """What a compiled network reports of its layers for inputs like x, one text for each line."""
    return [str(line) for line in network.layers(x)]


_COMPILE = """
import flax.linen as nn
import jax.numpy as jnp
import jax
import compressx
class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Conv(8, (3, 3))(x)
x = jnp.ones((1, 8, 8, 3))
f = compressx.compile(Network(), Network().init(jax.random.key(0), x))
f(x)
print(f.path)
"""


def copy_native_libraries(cache: Path) -> None:
    """Puts this machine's libraries where `compile_in_a_process` looks: building one takes half a minute."""
    held = cache_folder()
    todays = {build._named(part.LIBRARY)[0] for part in (kernels.native, kernels.recurrent)}
    for library in held.rglob("*.so"):
        if library.name not in todays:
            continue  # of another version of the code
        copy = cache / "compressx" / library.relative_to(held)
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copy2(library, copy)


def compile_in_a_process(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A small network compiled and called in a process whose native libraries are kept in a folder; prints its path."""
    given = {name: value for name, value in os.environ.items() if name != "COMPRESSX_CACHE"}
    given |= {"XDG_CACHE_HOME": str(cache)} | environment
    return subprocess.run([sys.executable, "-c", _COMPILE], env=given, capture_output=True, text=True, timeout=300)


# Compaction and export


class Compacted(NamedTuple):
    """A smaller network: its variables, and `apply(variables, x)`."""

    variables: Any
    apply: Any


def compact(model: Any, variables: Any, x: Any) -> Compacted:
    """The network without what does not matter to its outputs."""
    small = compaction.compact(model, variables, x)
    return Compacted(small.variables, small.apply)


def coupled_rules(model: Any, variables: Any, x: Any, density: float) -> Any:
    """Rules that prune together the channels that belong together in this network."""
    return compaction.coupled_rules(compaction.groups(compaction.channels(model, variables, x)), density)


def onnx(model: Any, variables: Any, shape: Any) -> bytes:
    """The network as an ONNX model with input `x`."""
    return export.onnx(model, variables, shape)


def stablehlo(model: Any, variables: Any, shape: Any) -> bytes:
    """The network as serialized StableHLO."""
    return export.stablehlo(model, variables, shape)
