"""Which formulation of the product is fastest on the device at hand: each is timed on a layer of middling size."""

import statistics
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from compressx.crossbar.arrays import lay_out, paths_for
from compressx.crossbar.design import Design
from compressx.crossbar.mvm import crossbar_matmul
from compressx.timing import interleaved


def pick_path(design: Design) -> str:
    """The formulation for ideal cells: on a CPU as measured there; elsewhere measured once for each design."""
    if jax.default_backend() != "cpu":
        return fastest_path(design)
    return "table" if "table" in paths_for(design) else "popcount"


@lru_cache(maxsize=64)
def fastest_path(design: Design, rows: int = 512, filters: int = 128, batch: int = 256, rounds: int = 5) -> str:
    """The fastest of `arrays.paths_for(design)` on the default backend, measured once for each design.

    Args:
      design: the engine; its arrays are ideal.
      rows, filters, batch: of the layer that is timed, with random weights.
      rounds: how often each formulation is timed after it was compiled; their medians are compared.
    """
    times = measure_paths(design, rows, filters, batch, rounds)
    return min(times, key=lambda path: times[path])


def measure_paths(design: Design, rows: int, filters: int, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of a product by each formulation, timed in turn, all of them simulated."""
    rng = np.random.default_rng(0)
    low, high = design.weight_range
    w = rng.integers(low, high + 1, (rows, filters))
    w = np.abs(w) if design.signs == "polarized" else w
    x = jnp.asarray(rng.integers(0, design.input_range[1] + 1, (batch, rows)), jnp.float32)
    run = jax.jit(crossbar_matmul)
    arrays = {path: lay_out(w, design, np.arange(rows), path, False, "weights") for path in paths_for(design)}
    calls = {path: partial(run, x, programmed) for path, programmed in arrays.items()}
    return {path: statistics.median(spent) for path, spent in interleaved(calls, rounds).items()}
