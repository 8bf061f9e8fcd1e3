"""What is measured of a compressed transformer: the network without its empty heads and units, its bytes and time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compressx import compaction, formats
from compressx.timing import interleaved
from experiments.common.models.functional import Functional
from experiments.common.training import Weights
from experiments.transformer.config import Model

SMALL = "compacted.safetensors"
BATCHES = (1, 16)
SECONDS = 0.5  # of measuring, a batch size


class Compacted(NamedTuple):
    """The network without empty channels.

    Attributes:
      facts: bytes of its weights and of its file, the largest difference of its outputs, quartiles of its latency, and
        whether the file gives the same outputs again.
      latency: median milliseconds of one input, dense and compacted.
    """

    facts: dict[str, Any]
    latency: dict[str, float]


def compacted(workdir: Path, net: Functional, dense: Weights, result: Weights, inputs: np.ndarray) -> Compacted:
    """Removes what is empty, writes the small network as `compacted.safetensors`, reads it back and times it.

    Args:
      workdir: of the run.
      net: the network.
      dense: its weights before compression.
      result: its weights after it, inside their sets.
      inputs: as the network reads them, at least 16.
    """
    variables = jax.tree.map(jnp.asarray, result.params)
    small = compaction.compact(net.apply, variables, jnp.asarray(inputs[:1]))
    path = workdir / SMALL
    formats.save_model(path, small.variables, extra=compaction.removed(small.dead))
    saved = formats.load_model(path)
    again = compaction.restore(net.apply, net.like(), saved.params, saved.extra)
    x = jnp.asarray(inputs[: max(BATCHES)])
    whole, cut, reread = (
        np.asarray(jax.jit(f)(v, x))
        for f, v in ((net.apply, variables), (small.apply, small.variables), (again.apply, again.variables))
    )
    facts: dict[str, Any] = {
        "bytes": {"dense": _bytes(variables), "compacted": _bytes(small.variables)},
        "file_bytes": path.stat().st_size,
        "largest_difference": float(np.abs(whole - cut).max()),
        "same_from_file": bool((cut == reread).all()),
        "latency": {},
    }
    latency: dict[str, float] = {}
    for batch in BATCHES:
        runs = {
            "dense": _call(net.apply, jax.tree.map(jnp.asarray, dense.params), x[:batch]),
            "compacted": _call(small.apply, small.variables, x[:batch]),
        }
        taken = interleaved(runs, seconds=SECONDS)
        found = {name: [1e3 * float(q) for q in np.quantile(t, (0.25, 0.5, 0.75))] for name, t in taken.items()}
        facts["latency"][str(batch)] = {"rounds": len(taken["dense"]), **found}
        latency = latency or {"dense": found["dense"][1], "compressed": found["compacted"][1]}
    return Compacted(facts, latency)


def _call(apply: Callable[[Any, Any], Any], variables: Any, x: jax.Array) -> Callable[[], Any]:
    f = jax.jit(apply)
    return lambda: f(variables, x)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def narrower(model: Model, build: Callable[[Model], Functional], limit: int) -> Model:
    """The widest network of the same depth, heads and proportions whose float weights have at most so many bytes.

    What bytes its width leaves over, in steps of a dimension a head, go to its MLP.

    Args:
      model: the network that was compressed.
      build: makes the pure functions of a model.
      limit: bytes.

    Raises:
      ValueError: not even one dimension a head fits.
    """

    def fits(tried: Model) -> bool:
        return sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(build(tried).like())) <= limit

    widths = range(model.heads, model.width + 1, model.heads)
    sizes = [(w, max(1, round(model.hidden * w / model.width))) for w in widths]
    shapes = [dataclasses.replace(model, width=w, hidden=h) for w, h in sizes]
    fitting = [shape for shape in shapes if fits(shape)]
    if not fitting:
        raise ValueError(f"no network of {model.layers} layers and {model.heads} heads has at most {limit} bytes")
    best = fitting[-1]
    low, high = best.hidden, 4 * model.hidden
    while low < high:  # the largest hidden width that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(dataclasses.replace(best, hidden=middle)) else (low, middle - 1)
    return dataclasses.replace(best, hidden=low)
