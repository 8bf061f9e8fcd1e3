"""What one image takes: the dense network on XLA, and the compressed one through the kernels of its storage formats.

Both are measured in turn, so that other work on the machine meets them alike. Where the kernels do not run, the reason
stands in place of figures: on the fallback a compressed network is the dense one with zeros.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from compressx import formats, kernels, models


def of_images(
    saved: formats.SavedModel, dense: Any, shape: tuple[int, ...], classes: int, budget: float = 0.5
) -> tuple[dict[str, float] | None, dict[str, Any]]:
    """Median milliseconds of one image, batch 1, on all cores that the process may use.

    Args:
      saved: the compressed network, with its name.
      dense: variables of the dense one.
      shape: of an image, `[rows, columns, channels]`.
      classes: that the network tells apart.
      budget: seconds to measure for; at least 5 rounds.

    Returns:
      The `latency_ms` section of a summary, None where the kernels do not run; and the facts: path, rounds, and the
      quartiles of each, or the reason.
    """
    if saved.model is None or len(shape) != 3:
        return None, {"reason": "no network of images is named in the file"}
    x = np.zeros((1, *shape), np.float32)
    options = {**saved.model.get("options", {}), "classes": classes}
    try:
        compressed = kernels.compile(saved._replace(model={"name": saved.model["name"], "options": options}))
        if compressed.path == "xla":
            return None, {"reason": "the kernels do not run here: no compiler, turned off, or not on the CPU"}
        if not compressed.layers(x):
            return None, {"reason": "the network has no convolution"}
        model = models.build(saved.model["name"], **options)
        runs = {"dense": kernels.compile(model, dense, path="xla"), "compressed": compressed}
        taken = _interleaved(runs, x, budget)
    except (ValueError, TypeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        # a finished training is not lost for this
        return None, {"reason": f"{type(error).__name__}: {str(error)[:200]}"}
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in taken.items()}
    facts = {f"{name}_ms": {"low": q[0], "median": q[1], "high": q[2]} for name, q in quartiles.items()}
    about = {"path": compressed.path, "rounds": len(taken["dense"]), **facts}
    return {name: q[1] for name, q in quartiles.items()}, about


def _interleaved(runs: Mapping[str, Callable[[Any], Any]], x: Any, budget: float) -> dict[str, list[float]]:
    """Milliseconds of each in every round, after two of warming up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready([run(x), run(x)])
    start = time.perf_counter()
    while len(next(iter(taken.values()))) < 5 or time.perf_counter() - start < budget:
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(x))
            taken[name].append(1e3 * (time.perf_counter() - begin))
    return taken
