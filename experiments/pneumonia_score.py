"""How good and how large the networks of `experiments.pneumonia` are: scores, compaction, times."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compressx import compaction, detection
from compressx.compaction import gathered
from compressx.compaction.cost import LayerCost
from compressx.compaction.device import estimate
from compressx.data import batches
from compressx.detection import screening
from compressx.detection.score import Found
from compressx.detection.task import find_all
from compressx.models.layers import convolve
from experiments.pneumonia_data import Task

SPECIFICITY = 0.9


class Judge:
    """Scores networks of one architecture on one task; each prediction program is compiled once."""

    def __init__(self, task: Task, model: Any, batch: int) -> None:
        self.task, self.batch = task, batch
        if task.geometry is not None:
            self._find = detection.predictor(model.apply, task.prepare, task.geometry)
        else:
            self._logits = jax.jit(lambda v, x: jax.nn.softmax(model.apply(v, task.prepare(x)))[:, 1])

    def found(self, variables: Any, part: dict[str, np.ndarray]) -> list[Found]:
        """Detections beside true boxes, for every image of a split."""
        return find_all(self._find, variables, part, self.batch)

    def score(self, variables: Any, threshold: float | None = None) -> dict[str, Any]:
        """All figures of a network; numbers that do not exist (of a split without positives) are None.

        Args:
          variables: of the network, on the host or a device.
          threshold: confidence above which boxes count; None: the best one on the validation images.
        """
        variables = jax.tree.map(jnp.asarray, variables)
        judged = self.task.judged["test"]
        if self.task.geometry is None:
            probability = self._probabilities(variables, self.task.test)
            out: dict[str, Any] = {"threshold": 0.5}
            out["accuracy"] = float(((probability >= 0.5) == judged.positive.astype(bool)).mean())
        else:
            if threshold is None:
                mine = self.found(variables, self.task.validation)
                boxed = self.task.judged["validation"].boxed
                threshold, value = detection.choose_threshold([f for f, b in zip(mine, boxed, strict=True) if b])
            else:
                value = None
            every = self.found(variables, self.task.test)
            images = [f for f, b in zip(every, judged.boxed, strict=True) if b]
            score = detection.challenge_score(images, threshold)
            probability = np.array([f.scores.max(initial=0.0) for f in every])
            out = {
                "threshold": threshold,
                "validation_score": value,
                "challenge_score": score.value,
                "images_scored": score.images,
                "map_50": detection.average_precision(images, 0.5),
                "map_40_75": detection.mean_average_precision(images),
            }
        interval = screening.auc_interval(judged.positive, probability, judged.patient)
        out |= {"auc": interval.value, "auc_low": interval.low, "auc_high": interval.high}
        calibration = screening.reliability(judged.positive, np.clip(probability, 0, 1))
        out["calibration_error"] = calibration.error
        if 0 < judged.positive.mean() < 1:
            point = screening.sensitivity_at(judged.positive, probability, SPECIFICITY)
            out |= {"sensitivity": point.sensitivity, "at_specificity": point.specificity}
        out["reliability"] = {k: getattr(calibration, k).tolist() for k in ("predicted", "observed", "count")}
        return {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in out.items()}

    def _probabilities(self, variables: Any, part: dict[str, np.ndarray]) -> np.ndarray:
        n = len(part["labels"])
        rows, valid = batches.cover(n, min(self.batch, n))
        pairs = zip(rows, valid, strict=True)
        parts = [np.asarray(self._logits(variables, jnp.asarray(part["inputs"][r])))[v] for r, v in pairs]
        return np.concatenate(parts).astype(np.float64)


class Size(NamedTuple):
    """What a network takes.

    Attributes:
      layers: its convolutions and matrices.
      facts: sums over them, for the summary.
      small: the compact network; None for the dense one.
      packed: its variables with unused positions left out, and those positions.
    """

    layers: list[LayerCost]
    facts: dict[str, Any]
    small: compaction.Compact | None = None
    packed: tuple[Any, dict[str, np.ndarray]] | None = None


def _inputs(task: Task) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *task.shape), jnp.float32)


def _facts(layers: list[LayerCost], peak: int) -> dict[str, Any]:
    convolutions = [c for c in layers if len(c.shape) == 4]
    guess = estimate(layers)
    return {
        "weights": sum(c.weights for c in convolutions),
        "macs": sum(c.macs for c in layers),
        "peak_activation_bytes": peak,
        "tx2_estimate": {"milliseconds": 1e3 * guess.seconds, "frames": guess.frames, "joules": guess.joules},
    }


def whole(model: Any, variables: Any, task: Task) -> Size:
    """The dense network."""
    x = _inputs(task)
    layers = compaction.costs(model, variables, x)
    return Size(layers, _facts(layers, compaction.peak_bytes(model, variables, x)))


def compacted(model: Any, variables: Any, task: Task) -> Size:
    """A pruned network, compacted, and how far its outputs are from the masked one's on test images."""
    x = _inputs(task)
    variables = jax.tree.map(jnp.asarray, variables)
    small = compaction.compact(model, variables, x)
    packed = compaction.gather(small.variables)
    layers = compaction.costs(small.apply, small.variables, x, used=packed[1])
    images = task.prepare(jnp.asarray(task.test["inputs"][:4]))
    masked = jax.jit(lambda v, i: model.apply(v, i))(variables, images)
    ours = jax.jit(small.apply)(small.variables, images)
    gaps = [float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(masked), jax.tree.leaves(ours), strict=True)]
    facts = _facts(layers, compaction.peak_bytes(small.apply, small.variables, x))
    facts["masked_minus_compacted"] = max(gaps)
    return Size(layers, facts, small, packed)


# -- times -------------------------------------------------------------------------------------------------------------


class LayerTime(NamedTuple):
    """Milliseconds of one layer alone: dense, the smaller kernel by plain convolution, and by gathered product."""

    path: str
    dense: float
    small: float | None
    gathered: float | None


class Times(NamedTuple):
    """Medians in milliseconds for one image.

    Attributes:
      dense: the dense network.
      compressed: the fastest way to run the compact one.
      layers: by layer.
      facts: for the summary.
    """

    dense: float
    compressed: float
    layers: list[LayerTime]
    facts: dict[str, Any]


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call; a round makes each once, so that other work on the machine meets all alike."""
    for call in calls.values():
        jax.block_until_ready(call())
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            spent[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in spent.items()}


def times(model: Any, dense: Any, size: Size, task: Task, rounds: int) -> Times:
    """Measures the dense and the compact network, whole and by layer; gathers where that was faster for the layer."""
    assert size.small is not None and size.packed is not None
    small, (_, positions) = size.small, size.packed
    x = jnp.zeros((1, *task.shape), jnp.float32)
    before = {c.path: c for c in compaction.costs(model, dense, _inputs(task))}
    cache: dict[Any, float] = {}
    rows = []
    for path, layer in before.items():
        mine = next((c for c in size.layers if c.path == path), None)
        rows.append(
            LayerTime(
                path,
                _layer(layer, None, rounds, cache),
                None if mine is None else _layer(mine, None, rounds, cache),
                _layer(mine, positions[path], rounds, cache) if mine is not None and path in positions else None,
            )
        )
    better = {r.path for r in rows if r.gathered is not None and r.small is not None and r.gathered < r.small}
    mixed, used = compaction.gather(small.variables, lambda path, kernel: path in better)
    all_packed, all_used = size.packed
    ways = {
        "dense": (lambda v, i: model.apply(v, i), jax.tree.map(jnp.asarray, dense)),
        "plain": (small.apply, small.variables),
        "mixed": (compaction.smaller(model, dense, small.dead, positions=used), mixed),
        "gathered": (compaction.smaller(model, dense, small.dead, positions=all_used), all_packed),
    }
    if not used:
        del ways["mixed"]
    if not all_used:
        del ways["gathered"]
    compiled = {name: (jax.jit(f), v) for name, (f, v) in ways.items()}
    got = interleaved({name: functools.partial(f, v, x) for name, (f, v) in compiled.items()}, rounds)
    best = min((name for name in got if name != "dense"), key=got.__getitem__)
    facts = {"milliseconds": got, "best": best, "gathered_layers": len(used), "rounds": rounds, "batch": 1}
    return Times(got["dense"], got[best], rows, facts)


def _layer(layer: LayerCost, used: np.ndarray | None, rounds: int, cache: dict[Any, float]) -> float:
    """Median milliseconds of one layer on its own."""
    key = (layer.shape, layer.image, layer.stride, None if used is None else used.tobytes())
    if key in cache:
        return cache[key]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, *layer.image), np.float32))
    if len(layer.shape) == 2:
        w = jnp.asarray(rng.standard_normal(layer.shape, np.float32))
        run = jax.jit(jnp.dot)
    else:
        pad, stride = layer.shape[0] // 2, (layer.stride, layer.stride)
        pads = ((pad, pad), (pad, pad))
        if used is None:
            w = jnp.asarray(rng.standard_normal(layer.shape, np.float32))
            numbers = ("NHWC", "HWIO", "NHWC")
            run = jax.jit(lambda x, w: convolve(x, w, stride, pads, dimension_numbers=numbers))
        else:
            w = jnp.asarray(rng.standard_normal((len(used), layer.shape[3]), np.float32))
            window = layer.shape[:3]
            run = jax.jit(lambda x, w: gathered.gathered_conv(x, w, used, window, stride, pads))
    cache[key] = interleaved({"it": lambda: run(x, w)}, rounds)["it"]
    return cache[key]
