"""What a reconstruction reports: a line for each layer, and how far the network as a whole is from the dense one."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from compressx.reconstruction.stream import Stream


class Layer(NamedTuple):
    """What became of one constrained leaf.

    Attributes:
      path: of the leaf.
      constraint: the set, in words.
      inputs: "compressed", those of the compressed network so far; "dense", those of the dense one (a leaf that several
        products read, or of a joint rule); "none", projected only, as no product reads it.
      shortcut: whether the error of a shortcut was corrected with it.
      error: tr (W - A)' H (W - A) / tr A' H A, A being what the leaf aims at.
      kept: which candidate of the solver it is.
      tried: the error of each.
      iterations: of ADMM.
      residual: |W - Z| / |W| at its end.
      weights: weights that are not zero, and all.
      seconds: for statistics and solver.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 4))
      >>> rules = [("w", compressx.unstructured(keep=3))]
      >>> _, report = compressx.reconstruct(lambda v, x: x @ v["w"], {"w": jnp.ones((4, 2))}, rules, [x])
      >>> report.layers[0].path, report.layers[0].weights
      ('w', (3, 8))
    """

    path: str
    constraint: str
    inputs: str
    shortcut: bool
    error: float
    kept: str
    tried: dict[str, float]
    iterations: int
    residual: float
    weights: tuple[int, int]
    seconds: float


class Report(NamedTuple):
    """What `reconstruct` did.

    Attributes:
      layers: in the order in which they were taken.
      norms: paths of the running means whose statistics moved.
      biases: paths of the biases that took a mean.
      agreement: share of the calibration examples on which the largest output of both networks is the same; None where
        the network's output is not one array of more than one number an example.
      output_error: |compressed - dense|^2 / |dense|^2 of the outputs.
      seconds: in all.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 4))
      >>> rules = [("w", compressx.unstructured(keep=3))]
      >>> _, report = compressx.reconstruct(lambda v, x: x @ v["w"], {"w": jnp.ones((4, 2))}, rules, [x])
      >>> report.table().splitlines()[0].split()
      ['leaf', 'error', 'kept', 'steps', 'non-zero', 'seconds']
    """

    layers: tuple[Layer, ...]
    norms: tuple[str, ...]
    biases: tuple[str, ...]
    agreement: float | None
    output_error: float
    seconds: float

    def table(self) -> str:
        """The layers as lines of text."""
        rows = [("leaf", "error", "kept", "steps", "non-zero", "seconds")]
        for layer in self.layers:
            held = f"{layer.weights[0]}/{layer.weights[1]}"
            rows.append(
                (layer.path, f"{layer.error:.4f}", layer.kept, str(layer.iterations), held, f"{layer.seconds:.2f}")
            )
        wide = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(n) for c, n in zip(row, wide, strict=True)).rstrip() for row in rows)


Progress = Callable[[int, int, Layer], None]


def agreement(stream: Stream) -> tuple[float | None, float]:
    """Share of equal answers, and the relative squared error of the outputs."""
    same = rows = 0
    lost = size = 0.0
    single = all(len(outputs) == 1 for outputs in stream.outputs())
    for outputs in stream.outputs():
        for compressed, dense in outputs:
            a, b = (np.asarray(x, np.float64) for x in (compressed, dense))
            lost, size = lost + float(np.sum((a - b) ** 2)), size + float(np.sum(b**2))
            if single and a.ndim and a.shape[-1] > 1:
                same += int((a.argmax(-1) == b.argmax(-1)).sum())
                rows += a.size // a.shape[-1]
    return (same / rows if rows else None), (lost / size if size else 0.0)
